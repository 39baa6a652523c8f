"""trainer.task as a user runs it, with ResNet50 at a small size: what it writes, and what other commands do with it."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.images import write_images
from tests.support.paths import WEIGHTS
from tests.support.processes import run_command
from trainer import config, task
from trainer.artifacts.job_dir import HISTORY_COLUMNS, JobDir
from trainer.config import Config
from trainer.errors import UserError

FLAGS = [
    "--weights=none",
    "--image_size=32",
    "--head_epochs=0",
    "--epochs=2",
    "--batch_size=8",
    "--learning_rate=1e-3",
    "--precision=float32",
    "--price_per_hour=3.6",
]
ODD = "<b>dog & $cat$"
VERTEX = {
    "AIP_MODEL_DIR": "gs://bucket/base/model/",
    "AIP_CHECKPOINT_DIR": "gs://bucket/base/checkpoints/",
    "AIP_TENSORBOARD_LOG_DIR": "gs://bucket/base/logs/",
}


def test_paths_come_from_vertex_without_flags():
    settings = task.with_environment(Config(data_dir="d"), VERTEX)
    assert settings.job_dir == "gs://bucket/base"
    assert settings.model_dir == "gs://bucket/base/model"
    assert settings.tensorboard_dir == "gs://bucket/base/logs"


def test_flags_override_vertex_and_defaults_are_in_job_dir():
    settings = task.with_environment(Config(data_dir="d", job_dir="j/", model_dir="m"), VERTEX)
    assert (settings.job_dir, settings.model_dir) == ("j", "m")
    settings = task.with_environment(Config(data_dir="d", job_dir="j"), {})
    assert (settings.model_dir, settings.tensorboard_dir) == ("j/saved_model", "j/logs")


def test_data_dir_needs_a_job_dir_and_the_demo_does_not():
    with pytest.raises(UserError, match="--job_dir is not set"):
        task.with_environment(Config(data_dir="d"), {})
    for settings in (Config(), Config(data_dir="demo")):
        settings = task.with_environment(settings, {})
        assert (settings.data_dir, settings.job_dir) == ("demo", "demo_job")


def test_a_job_dir_needs_a_data_dir_and_a_run_there_is_not_replaced_by_the_demo(tmp_path):
    JobDir(str(tmp_path)).write_config({"flags": {"data_dir": "pictures", "augment": "basic"}})
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"--data_dir is not set: .* --data_dir=pictures, the folder of the run there; or"
    ):
        task.with_environment(Config(job_dir=str(tmp_path)), {})
    settings = task.with_environment(Config(job_dir=str(tmp_path), data_dir="demo"), {})
    with pytest.raises(UserError, match="holds a run on pictures: pass another --job_dir for the demo"):
        task.run(settings)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.json"}


def test_weights_may_be_those_of_an_earlier_job(tmp_path):
    JobDir(str(tmp_path)).write_config({"flags": {}})
    with pytest.raises(UserError, match=r"best\.weights\.h5 does not exist"):
        task._weights_file(f"{tmp_path}/")
    (tmp_path / "best.weights.h5").touch()
    assert task._weights_file(f"{tmp_path}/") == JobDir(str(tmp_path)).best_weights
    assert task._weights_file("imagenet") == "imagenet"


def test_a_batch_is_at_most_all_training_images(caplog):
    with caplog.at_level("INFO", logger="absl"):
        assert task._with_batch_that_fits(Config(batch_size=32), 13).batch_size == 13
    assert "--batch_size=32 is more than the 13 training images: the batch is all of them." in caplog.messages
    assert task._with_batch_that_fits(Config(batch_size=13), 13).batch_size == 13


def test_a_format_without_its_packages_is_refused_first(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else find_spec(name))
    settings = Config(data_dir="nowhere", job_dir=str(tmp_path / "job"), export_formats="tflite,onnx")
    with pytest.raises(UserError, match="onnx needs packages that are not installed \\(tf2onnx\\): pip install"):
        task.run(settings)
    assert not (tmp_path / "job").exists()


def test_a_run_without_a_checkpoint_restarts_with_other_flags(tmp_path):
    """For example one whose weights could not be downloaded: the fix is another value of --weights."""
    paths, settings = JobDir(str(tmp_path)), Config(job_dir=str(tmp_path), weights="w.h5")
    flags = {**settings.as_dict(), "weights": "imagenet"}
    paths.write_config({"flags": flags, "defaults": config.DEFAULTS, "fingerprint": "of other images"})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "features-0123456789abcdef-000000000.npz").touch()
    task._with_earlier_flags(settings, "of these images", None, ())
    for name in ("checkpoints/000001.npz", "checkpoints/000001.npz.damaged", "best.weights.h5", "metrics.json"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"weights: imagenet -> w\.h5"):
            task._with_earlier_flags(settings, "of these images", None, ())
        (tmp_path / name).unlink()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"cat": 15, ODD: 10, "it's": 10})


@pytest.fixture(scope="module")
def finished(images):
    """A job_dir after a run, and what the run printed."""
    job_dir = images.parent / "job"
    answer = run_command("trainer.task", f"--data_dir={images}", f"--job_dir={job_dir}", *FLAGS)
    assert answer.returncode == 0, answer.stderr
    return job_dir, answer


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_writes_the_documented_files(finished):
    job_dir, _ = finished
    assert {path.name for path in job_dir.iterdir()} == {
        "config.json",
        "split.csv",
        "labels.txt",
        "history.csv",
        "time.csv",
        "metrics.json",
        "best.weights.h5",
        "checkpoints",
        "saved_model",
        "report",
        "logs",
        "predictions.csv",
        "label_issues.csv",
        "bad_files.csv",
        "gradcam.json",
        "model_card.md",
    }
    names = ["accuracy", "val_accuracy", "loss", "val_loss", "confusion_matrix", "mistakes"]
    for name in names:
        with Image.open(job_dir / "report" / f"{name}.png") as image:
            assert image.width >= 400
            assert len(np.unique(np.asarray(image.convert("L")))) > 5, f"{name} is blank"
    assert (job_dir / "report" / "index.html").exists()
    handed_over = job_dir / "saved_model" / "assets.extra"
    assert {path.name for path in handed_over.iterdir()} == {"model.json", "metrics.json", "model_card.md"}
    assert (handed_over / "metrics.json").read_bytes() == (job_dir / "metrics.json").read_bytes()
    assert (job_dir / "labels.txt").read_text() == f"{ODD}\ncat\nit's\n"


@pytest.mark.slow
def test_history_and_metrics_agree(finished):
    job_dir, _ = finished
    history = rows_of(job_dir / "history.csv")
    metrics = json.loads((job_dir / "metrics.json").read_text())
    assert tuple(history[0]) == HISTORY_COLUMNS
    assert [row["epoch"] for row in history] == ["1", "2"]
    accuracies = [float(row["val_accuracy"]) for row in history]
    assert metrics["val_accuracy"] == max(accuracies)
    assert metrics["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert (metrics["train_images"], metrics["validation_images"], metrics["bad_images"]) == (28, 7, 0)
    assert (metrics["replicas"], metrics["workers"], metrics["precision"]) == (1, 1, "float32")
    assert {name: scores["support"] for name, scores in metrics["per_class"].items()} == {"cat": 3, ODD: 2, "it's": 2}
    assert metrics["cost"] == pytest.approx(metrics["seconds"] / 1000, abs=1e-3)
    predictions = rows_of(job_dir / "predictions.csv")
    right = sum(row["label"] == row["predicted"] for row in predictions)
    assert right / len(predictions) == pytest.approx(metrics["val_accuracy"])


@pytest.mark.slow
def test_the_last_lines_name_report_model_and_a_working_command(finished):
    job_dir, answer = finished
    assert f"report: {job_dir}/report/index.html" in answer.stdout
    assert f"model:  {job_dir}/saved_model" in answer.stdout
    command = re.search(r"^try it: (.*)$", answer.stdout, re.MULTILINE)[1]
    command = command.replace("python", sys.executable, 1)
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "%" in shown.stdout


SERVE_ALONE = """
import sys, pathlib, json
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
contents = [pathlib.Path(path).read_bytes() for path in sys.argv[2:]]
answer = model.signatures["serving_default"](bytes=tf.constant(contents))
assert not any(name.split(".")[0] == "trainer" for name in sys.modules), "more than TensorFlow"
assert b"_tf_keras" not in pathlib.Path(sys.argv[1], "saved_model.pb").read_bytes(), "Keras objects are saved"
print(json.dumps({
    "label": [label.decode() for label in answer["label"].numpy()],
    "probability": answer["probability"].numpy().tolist(),
    "probabilities": answer["probabilities"].numpy().tolist(),
    "class_names": [n.decode() for n in model.signatures["class_names"]()["class_names"].numpy()],
}))
"""


@pytest.mark.slow
def test_saved_model_rebuilt_network_and_predictions_csv_agree(finished, images, tmp_path):
    job_dir, _ = finished
    assert json.loads((job_dir / "metrics.json").read_text())["calibration"]["temperature"] != 1
    predictions = rows_of(job_dir / "predictions.csv")
    paths = [images / row["path"] for row in predictions]
    alone = subprocess.run(
        [sys.executable, "-c", SERVE_ALONE, job_dir / "saved_model", *paths],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        cwd=tmp_path,
    )
    assert alone.returncode == 0, alone.stderr
    served = json.loads(alone.stdout)
    assert served["class_names"] == [ODD, "cat", "it's"]
    assert served["label"] == [row["predicted"] for row in predictions]
    np.testing.assert_allclose(served["probability"], [float(row["probability"]) for row in predictions], atol=1e-4)
    output = tmp_path / "out.jsonl"
    rebuilt = run_command("trainer.predict", f"--model_dir={job_dir}", f"--output={output}", *paths)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert "warning" not in rebuilt.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["path"] for answer in answers] == [str(path) for path in paths]
    values = [[answer["probabilities"][name] for name in served["class_names"]] for answer in answers]
    np.testing.assert_allclose(values, served["probabilities"], atol=1e-4)


@pytest.mark.slow
def test_predict_names_bad_files_and_continues(finished, images, tmp_path):
    job_dir, _ = finished
    (tmp_path / "a folder").mkdir()
    for i, source in enumerate(sorted((images / "cat").iterdir())[:3]):
        (tmp_path / "a folder" / f"{i}.jpg").write_bytes(source.read_bytes())
    broken = bytearray((tmp_path / "a folder" / "1.jpg").read_bytes())
    broken[100:-2] = bytes(len(broken) - 102)
    (tmp_path / "a folder" / "broken.jpg").write_bytes(broken)
    (tmp_path / "a folder" / "text.jpg").write_text("text")
    output = tmp_path / "out.csv"
    answer = run_command(
        "trainer.predict", f"--model_dir={job_dir}/saved_model", f"--output={output}", tmp_path / "a folder"
    )
    assert answer.returncode == 0, answer.stderr
    rows = rows_of(output)
    assert [os.path.basename(row["path"]) for row in rows] == ["0.jpg", "1.jpg", "2.jpg", "broken.jpg", "text.jpg"]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True, True]
    assert rows[3]["error"] == "truncated JPEG: its header is damaged"
    assert rows[4]["error"] == "not a JPEG, PNG, GIF, BMP or WebP image"
    nothing = run_command("trainer.predict", f"--model_dir={job_dir}/saved_model", tmp_path / "a folder" / "text.jpg")
    assert nothing.returncode == 2
    assert "none of 1 files could be classified" in nothing.stderr


@pytest.mark.slow
def test_evaluate_writes_the_report_of_a_labelled_folder(finished, images, tmp_path):
    job_dir, _ = finished
    unseen = write_images(tmp_path / "unseen", {"cat": 6, "it's": 4}, seed=9)
    answer = run_command(
        "trainer.evaluate",
        f"--model_dir={job_dir}/saved_model",
        f"--data_dir={unseen}",
        f"--report_dir={tmp_path / 'r'}",
    )
    assert answer.returncode == 0, answer.stderr
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    predictions = rows_of(tmp_path / "r" / "predictions.csv")
    assert metrics["validation_images"] == len(predictions) == 10
    assert metrics["val_accuracy"] == sum(row["label"] == row["predicted"] for row in predictions) / 10
    assert (tmp_path / "r" / "index.html").exists()
    write_images(tmp_path / "unseen", {"horse": 2})
    answer = run_command(
        "trainer.evaluate",
        f"--model_dir={job_dir}/saved_model",
        f"--data_dir={unseen}",
        f"--report_dir={tmp_path / 'r'}",
    )
    assert answer.returncode == 2
    assert "has the class 'horse', but the model has" in answer.stderr


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(finished, images):
    job_dir, _ = finished
    before = (job_dir / "history.csv").read_bytes(), (job_dir / "best.weights.h5").stat().st_mtime_ns
    answer = run_command("trainer.task", f"--data_dir={images}", f"--job_dir={job_dir}", *FLAGS)
    assert answer.returncode == 0, answer.stderr
    assert "is finished" in answer.stderr
    assert "validation accuracy, epoch " in answer.stdout
    assert " of 7 correct: " in answer.stdout
    assert ((job_dir / "history.csv").read_bytes(), (job_dir / "best.weights.h5").stat().st_mtime_ns) == before


@pytest.mark.slow
def test_a_job_dir_of_another_run_is_refused_and_not_changed(finished, images, tmp_path):
    job_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in job_dir.rglob("*")}
    arguments = ["trainer.task", f"--job_dir={job_dir}", *FLAGS]
    other_flags = run_command(*arguments, f"--data_dir={images}", "--learning_rate=5e-3")
    other_images = run_command(*arguments, f"--data_dir={write_images(tmp_path, {'a': 20, 'b': 20})}")
    not_resumed = run_command(*arguments, f"--data_dir={images}", "--noresume")
    for answer, message in (
        (other_flags, "learning_rate: 0.001 -> 0.005"),
        (other_images, "the class 'a' is new; the class 'b' is new; the class"),
        (not_resumed, "--noresume is set"),
    ):
        assert answer.returncode == 2, answer.stderr
        assert message in answer.stderr
    assert {path: path.stat().st_mtime_ns for path in job_dir.rglob("*")} == before


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_nothing(images, tmp_path):
    answer = run_command("trainer.task", f"--data_dir={images}", f"--job_dir={tmp_path / 'j'}", *FLAGS, "--dry_run",
                         "--group_by=.+")  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    for text in ("28 to train on, 7 to validate", "'cat': 12 + 3", "2 epochs of 4 steps", "23,593,859 parameters",
                 f"{tmp_path}/j/saved_model", "--learning_rate=0.001", "float32",
                 "in whole groups (--group_by=.+)"):  # fmt: skip
        assert text in answer.stdout
    command = answer.stdout.splitlines()[-1]
    assert command.startswith(f"start it: python -m trainer.task --data_dir={images} --job_dir={tmp_path / 'j'} ")
    assert command.endswith(" --group_by=.+")
    assert "--dry_run" not in command
    assert "--nodry_run" not in command
    assert not (tmp_path / "j").exists()


@pytest.mark.slow
def test_unreadable_weights_are_the_users_error(images, tmp_path):
    (tmp_path / "w.weights.h5").write_text("text")
    answer = run_command(
        "trainer.task",
        f"--data_dir={images}",
        f"--job_dir={tmp_path / 'j'}",
        *FLAGS[1:],
        f"--weights={tmp_path}/w.weights.h5",
    )
    assert answer.returncode == 2, answer.stderr
    assert "not a readable HDF5 weights file" in answer.stderr


@pytest.mark.slow
def test_the_flag_file_of_the_article_is_accepted():
    answer = run_command("trainer.task", "--help", "--flagfile=deploy/flags/article.flags")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.slow
def test_a_head_learns_real_images(shared, tmp_path):
    answer = run_command(
        "trainer.task",
        f"--data_dir={shared / 'data' / 'ten_objects'}",
        f"--weights={WEIGHTS}",
        f"--job_dir={tmp_path / 'j'}",
        "--head_epochs=8",
        "--image_size=96",
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads((tmp_path / "j" / "metrics.json").read_text())["val_accuracy"] > 0.85
