"""Labels for folders of any size: what was done is not done again, what cannot be read is told."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support.processes import run_command
from tests.support.tiny_model import CLASS_NAMES, make_image
from trainer.errors import UserError
from trainer.serving import batch
from trainer.serving.classifier import Prediction, _decode_error_reason, classify, load
from trainer.storage import files


@pytest.fixture(scope="module")
def classifier(tiny_model_dir):
    return load(str(tiny_model_dir))


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_ends_as_one_that_nobody_disturbed(tiny_model_dir, classifier, tmp_path):
    folder, output = tmp_path / "pictures", tmp_path / "labels.csv"
    (folder / "inner").mkdir(parents=True)
    large = make_image(2, height=3000, width=3000)  # which take long enough to be killed there
    for i in range(40):
        contents = large if i >= 20 else make_image(i % 3, seed=i)
        (folder / ("inner" if i > 30 else "") / f"{i:03d}.jpg").write_bytes(contents)
    (folder / "005.jpg").write_text("text")
    command = ["trainer.predict", f"--model_dir={tiny_model_dir}", "--batch_size=4", folder]
    running = subprocess.Popen([sys.executable, "-m", *map(str, command), f"--output={output}"])
    deadline = time.monotonic() + 120
    while not any(len(path.read_bytes().splitlines()) >= 20 for path in tmp_path.glob("*.partial")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not output.exists()
    (journal,) = tmp_path.glob("*.partial")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:18]) + lines[18][:-5])  # a kill in the middle of a write
    goes_on = run_command(*command, f"--output={output}")
    assert goes_on.returncode == 0, goes_on.stderr
    assert "Going on after 18 of 40 pictures" in goes_on.stderr
    assert "39 pictures labelled, 1 could not be" in goes_on.stderr
    assert not list(tmp_path.glob("*.partial"))
    batch.write_predictions(classifier, [str(folder)], f"{tmp_path}/other.csv", model="m", total=40, batch_size=4)
    assert output.read_text() == (tmp_path / "other.csv").read_text()


def test_only_what_fits_the_files_and_the_model_is_taken_from_before(classifier, tmp_path, caplog):
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.jpg"))
        (tmp_path / f"{i}.jpg").write_bytes(make_image(i % 3))
    output = f"{tmp_path}/out.jsonl"
    known = [json.dumps([path, [1.0, 0.0, 0.0], ""]) + "\n" for path in (paths[0], paths[2], paths[3])]
    (tmp_path / "out.jsonl.a1.partial").write_text("".join(known))

    def labels(model: str) -> list[str]:
        tally = batch.write_predictions(classifier, paths, output, model=model, total=4, batch_size=2)
        assert (tally.images, tally.failures) == (4, 0)
        with open(output) as file:
            return [json.loads(line)["label"] for line in file]

    assert labels("b2") == [CLASS_NAMES[i % 3] for i in range(4)]  # what another model said is left alone
    assert os.path.exists(f"{output}.a1.partial")
    # The second file is new since: the first line is kept, as wrong as it may be, and all from there on is asked again.
    (tmp_path / "0.jpg").write_bytes(make_image(1))
    assert labels("a1") == [CLASS_NAMES[0], *(CLASS_NAMES[i % 3] for i in range(1, 4))]


def test_each_error_is_one_line_that_a_person_understands(classifier):
    png = make_image(0, kind="PNG")
    broken = {
        "empty": (b"", "empty file"),
        "text": (b"hello", "not a JPEG, PNG, GIF, BMP or WebP picture"),
        "inside": (png.replace(b"IDAT", b"IDAT\0", 1), "cannot be decoded: Invalid PNG"),
    }
    images = [("good", make_image(0)), *((name, contents) for name, (contents, _) in broken.items()), ("end", png)]
    answers = classify(classifier, images, explain=True)
    assert [answer.path for answer in answers] == ["good", *broken, "end"]
    assert [int(answer.probabilities.argmax()) for answer in (answers[0], answers[-1])] == [0, 0]
    assert answers[0].heatmap.shape == (8, 8)
    for answer, (_, reason) in zip(answers[1:-1], broken.values(), strict=True):
        assert answer.error.startswith(reason)
        assert "\n" not in answer.error
        assert "{{" not in answer.error


def test_tensorflows_own_messages_are_cut_to_what_is_wrong():
    served = (
        "Graph execution error:\n\nDetected at node Assert/Assert defined at (most recent call last):\n"
        "<stack traces unavailable>\nassertion failed: [not a picture]\n\t [[{{node Assert/Assert}}]]\n"
        "\t [[Stateful/x]] [Op:__inference_1]"
    )
    eager = "{{function_node __wrapped__DecodeJpeg_device_/CPU:0}} Invalid JPEG data. [Op:DecodeJpeg]"
    assert _decode_error_reason(served) == "not a picture"
    assert _decode_error_reason(eager) == "Invalid JPEG data."


def test_what_is_no_file_is_named_and_the_others_go_on(classifier, tmp_path):
    good, pipe, loop = tmp_path / "good.png", tmp_path / "pipe.jpg", tmp_path / "loop.jpg"
    good.write_bytes(make_image(0))
    os.mkfifo(pipe)  # reading it would wait for ever
    loop.symlink_to(loop)
    answers = list(batch.predict(classifier, map(str, (pipe, loop, tmp_path / "gone.jpg", good))))
    assert [answer.error for answer in answers] == [
        "neither a file nor a folder",
        "cannot be read: Too many levels of symbolic links",
        "cannot be read: it is gone",
        "",
    ]


def test_a_heat_map_comes_from_a_run_as_from_its_saved_model(classifier):
    assert classifier.explain is not None
    probabilities, heatmaps = classifier.explain([make_image(1), make_image(2)])
    assert probabilities.argmax(axis=1).tolist() == [1, 2]
    assert heatmaps.max(axis=(1, 2)).tolist() == [1, 1]


def test_labels_go_on_in_a_bucket_too(classifier, bucket_url):
    for i in range(6):
        files.atomic_write(f"{bucket_url}/pictures/{i}.jpg", make_image(i % 3, seed=i))
    asked = []

    def stopped(contents: list[bytes]):
        asked.append(len(contents))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return classifier.probabilities(contents)

    arguments = ([f"{bucket_url}/pictures"], f"{bucket_url}/labels.jsonl")
    wanted = {"model": "m", "total": 6, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        batch.write_predictions(classifier._replace(probabilities=stopped), *arguments, **wanted)
    assert sorted(files.list_names(bucket_url)) == ["labels.jsonl.m.partial", "pictures"]
    asked.clear()
    tally = batch.write_predictions(classifier._replace(probabilities=stopped), *arguments, **wanted)
    assert (tally.images, tally.failures, asked) == (6, 0, [2])
    lines = files.read(arguments[1]).decode().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [CLASS_NAMES[i % 3] for i in range(6)]
    assert sorted(files.list_names(bucket_url)) == ["labels.jsonl", "pictures"]


def test_a_job_dir_that_lacks_a_file_is_told_in_words(tmp_path):
    (tmp_path / "config.json").write_text('{"flags": {}}')
    with pytest.raises(UserError, match=r"labels\.txt is not there"):
        load(str(tmp_path))
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"no best\.weights\.h5 yet"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no pictures: name files or folders behind the flags"),
        (["gone.jpg"], "gone.jpg does not exist: pass pictures or folders"),
        (["--output=labels.txt", "."], "--output=labels.txt ends neither in .csv nor in .jsonl"),
        (["nothing"], "There are no files below nothing"),
    ],
)
def test_what_cannot_be_labelled_is_told_before_anything_is_loaded(
    tiny_model_dir, tmp_path, monkeypatch, arguments, message
):
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    answer = run_command("trainer.predict", f"--model_dir={tiny_model_dir}", *arguments)
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert message in answer.stderr


def test_json_lines_tell_labels_and_errors():
    predictions = [Prediction("a.jpg", np.array([0.25, 0.75], np.float32)), Prediction("b.jpg", None, "gone")]
    lines = [json.loads(line) for line in batch._json_lines(iter(predictions), ("cat", "dog"))]
    assert lines[0] == {
        "path": "a.jpg",
        "label": "dog",
        "probability": 0.75,
        "probabilities": {"cat": 0.25, "dog": 0.75},
    }
    assert lines[1] == {"path": "b.jpg", "error": "gone"}
