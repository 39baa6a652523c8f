"""The Python API: the same results and messages as the commands, and the program that calls it stays as it was."""

import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import trainer
from tests.support import tiny_job, tiny_model
from tests.support.images import write_images
from tests.support.paths import ROOT
from trainer import api
from trainer.config import Config
from trainer.errors import UserError

FLAGS = {
    "weights": "none",
    "head_epochs": 0,
    "epochs": 5,
    "image_size": 32,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "preprocessing": "rescale",
    "precision": "float32",
}


def train(data_dir, job_dir, *, on_epoch=None, **flags):
    """trainer.train with a small network."""
    given = {**FLAGS, **flags}
    return api._train(
        data_dir, job_dir, on_epoch=on_epoch, quiet=False, flag_values=given, build_network=tiny_job.build
    )


def without_times(history):
    left_out = ("seconds", "images_per_second", "job_dir")
    return [{name: row[name] for name in row if name not in left_out} for row in history]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"cat": 20, "dog": 20})


@pytest.fixture(scope="module")
def finished(images):
    """The result of a run that was started in another thread than the main one, and the rows that on_epoch received."""
    rows, results = [], []
    thread = threading.Thread(target=lambda: results.append(train(images, images.parent / "job", on_epoch=rows.append)))
    thread.start()
    thread.join()
    return results[0], rows


def state_of_the_process():
    import keras

    loggers = {name: logging.getLogger(name) for name in (None, "absl", "tensorflow")}
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "keras": (keras.config.dtype_policy().name, keras.config.floatx()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "files here": sorted(os.listdir()),
        "logging": [(name, logger.level, logger.propagate, list(logger.handlers)) for name, logger in loggers.items()],
    }


@pytest.mark.slow
def test_the_result_has_what_is_in_the_job_dir(finished, images):
    result, rows = finished
    assert result.paths.root == str(images.parent / "job")
    assert result.history == rows
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert result.metrics["val_accuracy"] == max(row["val_accuracy"] for row in rows)
    assert result.classifier.class_names == ("cat", "dog")
    assert result.report.page.startswith("<!DOCTYPE html>")
    shown = result.report._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert shown.count("<") == 2


@pytest.mark.slow
def test_a_second_run_with_another_seed_and_precision_leaves_the_process_as_it_was(finished, images):
    import keras
    import tensorflow as tf

    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(7)
    try:
        before, draws = state_of_the_process(), tf.random.uniform([2]).numpy()
        keras.utils.set_random_seed(7)
        with pytest.raises(ZeroDivisionError):  # what on_epoch raises ends the run
            train(images, images.parent / "other", on_epoch=lambda row: 1 / 0, seed=1, precision="mixed_bfloat16")
        assert state_of_the_process() == before
        np.testing.assert_array_equal(tf.random.uniform([2]).numpy(), draws)
    finally:
        keras.config.set_dtype_policy("float32")
    assert not (images.parent / "other" / "metrics.json").exists()


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt in the main thread, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_an_interrupted_run_is_saved_and_resumes_as_if_nothing_had_happened(finished, images, interrupts):
    job_dir, log = images.parent / "interrupted", images.parent / "log.jsonl"
    with pytest.raises(KeyboardInterrupt, match="The run is saved"):
        train(images, job_dir, on_epoch=f"cat >> {log}; kill -INT {os.getpid()}")
    assert not (job_dir / "metrics.json").exists()
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    rows = []

    def stop_again(row):
        rows.append(row)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(images, job_dir, on_epoch=stop_again)
    assert [row["epoch"] for row in logged + rows] == list(range(1, len(logged) + 2))  # each epoch once
    assert without_times(logged + rows) == without_times(finished[0].history[: len(logged) + 1])


@pytest.mark.slow
def test_predict_takes_paths_bytes_arrays_and_images(tiny_model_dir, tmp_path):
    classifier = trainer.load(tiny_model_dir)
    contents = [tiny_model.make_image(index, kind="PNG", seed=index) for index in range(3)]
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{index}.png" for index in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    pictures = [Image.open(io.BytesIO(content)) for content in contents]
    expected = [prediction.probabilities for prediction in classifier.predict(paths)]
    assert [max(values, key=values.get) for values in expected] == list(tiny_model.CLASS_NAMES)
    for given in (tmp_path / "images", contents, pictures, [np.asarray(image) for image in pictures]):
        assert [prediction.probabilities for prediction in classifier.predict(given)] == expected
    one = classifier.predict(str(paths[1]))
    assert [(prediction.path, prediction.label) for prediction in one] == [(str(paths[1]), "grün")]
    assert one[0].is_novel is False
    bad, good = classifier.predict([b"no image", np.stack([np.asarray(image) for image in pictures])[0]])
    assert (bad.label, bad.probabilities, bad.path) == ("", {}, "")
    assert "not" in bad.error
    assert good.label == tiny_model.CLASS_NAMES[0]
    with pytest.raises(UserError, match=r"array float64 of shape \(2, 2, 3\), expected uint8"):
        classifier.predict(np.zeros([2, 2, 3]))
    with pytest.raises(UserError, match="does not exist"):
        classifier.predict("nowhere.jpg")


@pytest.mark.slow
def test_evaluate_and_inspect_return_what_the_commands_write(tiny_model_dir, tmp_path):
    for index, name in enumerate(("grün", "blue"), start=1):
        (tmp_path / "unseen" / name).mkdir(parents=True)
        for seed in range(4):
            path = tmp_path / "unseen" / name / f"{seed}.jpg"
            path.write_bytes(tiny_model.make_image(index, seed=10 * index + seed))
    evaluation = trainer.evaluate(
        tiny_model_dir, tmp_path / "unseen", report_dir=tmp_path / "report", min_precision=0.9
    )
    assert evaluation.metrics["val_accuracy"] == 1.0
    assert evaluation.metrics["min_precision"]["required"] == 0.9
    assert "blue" in evaluation.report.page
    (tmp_path / "unseen" / "blue" / "copy.jpg").write_bytes(path.read_bytes())
    inspection = trainer.inspect(tmp_path / "unseen")
    assert [problem.title for problem in inspection.problems] == [
        "the same content more than once in a class: keep one"
    ]
    assert inspection.summary["classes"] == {"blue": 5, "grün": 4}
    assert inspection.report.path == ""
    written = trainer.inspect(tmp_path / "unseen", output_dir=tmp_path / "inspection")
    assert (tmp_path / "inspection" / "inspect.html").read_text() == written.report.page


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("train", {"epoch": 3}, "Unknown command line flag 'epoch'. Did you mean: epochs ?"),
        ("train", {"noresume": True}, "Unknown command line flag 'noresume'. Did you mean: resume ?"),
        ("train", {"epochs": "two"}, "flag --epochs=two: invalid literal for int() with base 10: 'two'"),
        ("train", {"epochs": True}, "flag --epochs=True: invalid literal for int() with base 10: 'True'"),
        ("train", {"cache": "ram"}, "flag --cache=ram: value should be one of <auto|memory|disk|none>"),
        ("train", {"data_dir": 3}, "flag --data_dir=3: flag value must be a string"),
        ("train", {"image_size": 8}, "--image_size is 8: pass a number of at least 32"),
        ("train", {"max_cost": 1.0}, "--max_cost is 1.0, but --price_per_hour is not set"),
        ("train", {"job_dir": ""}, "--job_dir is not set"),
        ("train", {"dry_run": True}, "--dry_run is for the command trainer.task"),
        ("train", {"on_epoch": 3}, "on_epoch is a int, expected a function of one row, or a command as text"),
        ("train", {}, "nowhere does not exist"),
        ("load", {}, "--model_dir=nowhere does not exist"),
        ("evaluate", {"report_dir": ""}, "--report_dir is not set"),
        ("evaluate", {"report_dir": "r", "batch_size": 0}, "flag --batch_size=0: 0 is not a positive integer"),
        ("evaluate", {"report_dir": "r"}, "nowhere does not exist"),
        ("inspect", {}, "nowhere does not exist"),
        ("inspect", {"weights": "none"}, "--weights=none is not a file"),
    ],
)
def test_a_mistake_is_an_exception_with_the_words_of_the_command(function, arguments, message):
    given = {
        "train": {"data_dir": "nowhere", "job_dir": "nowhere/job"},
        "load": {"model_dir": "nowhere"},
        "evaluate": {"model_dir": "nowhere", "data_dir": "nowhere"},
        "inspect": {"data_dir": "nowhere"},
    }[function]
    with pytest.raises(trainer.UserError) as error:
        getattr(trainer, function)(**{**given, **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize("quiet", [False, True])
def test_lines_go_to_standard_error_during_a_call_alone(quiet, tmp_path):
    """In a process without handlers of logging, as a notebook is. The run fails before it imports TensorFlow."""
    write_images(tmp_path / "pictures", {"cat": 20, "dog": 20})
    program = f"""
import logging, os, trainer
from absl import logging as absl_logging
environment = dict(os.environ)
try:
    trainer.train("pictures", "job", quiet={quiet})
except trainer.UserError as error:
    print(error)
assert not logging.root.handlers and not logging.getLogger("absl").handlers, logging.root.handlers
assert environment == dict(os.environ)
logging.getLogger("absl").info("not shown")
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.stdout == "The backend of Keras is jax, expected tensorflow: unset KERAS_BACKEND.\n", answer.stderr
    assert ("Images:" in answer.stderr) is not quiet
    assert answer.stderr.count("\n") == (0 if quiet else 1)


def test_a_program_that_shows_info_lines_receives_them(caplog):
    with caplog.at_level(logging.INFO, logger="absl"), api._guest(quiet=False):
        logging.getLogger("absl").info("for the host")
    assert "for the host" in caplog.text


def test_the_recipe_of_the_article_is_overridden_by_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr(api.task, "prepare_and_run", lambda settings, host, build_network: seen.append(settings))
    with pytest.raises(UserError):  # there is no result
        trainer.train("pictures", "nowhere/job", recipe="article", epochs=2)
    assert isinstance(seen[0], Config)
    assert (seen[0].epochs, seen[0].head) == (2, "flatten")
