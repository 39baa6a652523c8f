"""Predictions for folders of any size: errors per file, resume from the journal, output formats."""

import csv
import dataclasses
import io
import json
import os

import numpy as np
import pytest

from tests.support.tiny_model import CLASS_NAMES, make_image
from trainer.serving import batch
from trainer.serving.classifier import Prediction
from trainer.storage import files

PREDICTIONS = [Prediction("a.jpg", np.array([0.25, 0.75], np.float32)), Prediction("b.jpg", None, "gone")]


def test_journal_lines_are_reused_only_for_the_same_files_and_model(classifier, tmp_path):
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.jpg"))
        (tmp_path / f"{i}.jpg").write_bytes(make_image(i % 3))
    output = f"{tmp_path}/out.jsonl"
    journal = [json.dumps([path, [1.0, 0.0, 0.0], ""]) + "\n" for path in (paths[0], paths[2], paths[3])]
    (tmp_path / "out.jsonl.a1.partial").write_text("".join(journal))

    def labels(fingerprint: str) -> list[str]:
        tally = batch.write_predictions(classifier, paths, output, fingerprint=fingerprint, total=4, batch_size=2)
        assert (tally.images, tally.failures) == (4, 0)
        with open(output) as file:
            return [json.loads(line)["label"] for line in file]

    assert labels("b2") == [CLASS_NAMES[i % 3] for i in range(4)]  # the journal of another model is not touched
    assert os.path.exists(f"{output}.a1.partial")
    # The second file is not in the journal: only the line before it is reused, although its label is now wrong.
    (tmp_path / "0.jpg").write_bytes(make_image(1))
    assert labels("a1") == [CLASS_NAMES[0], *(CLASS_NAMES[i % 3] for i in range(1, 4))]


def test_a_path_that_is_not_a_readable_file_fails_no_other(classifier, tmp_path):
    good, pipe, loop = tmp_path / "good.png", tmp_path / "pipe.jpg", tmp_path / "loop.jpg"
    good.write_bytes(make_image(0))
    os.mkfifo(pipe)  # reading it would block forever
    loop.symlink_to(loop)
    predictions = list(batch.predict(classifier, map(str, (pipe, loop, tmp_path / "gone.jpg", good))))
    assert [prediction.error for prediction in predictions] == [
        "neither a file nor a folder",
        "cannot be read: Too many levels of symbolic links",
        "cannot be read: it does not exist",
        "",
    ]


def test_predictions_in_a_bucket_resume(classifier, bucket_url):
    for i in range(6):
        files.atomic_write(f"{bucket_url}/pictures/{i}.jpg", make_image(i % 3, seed=i))
    batch_sizes = []

    def interrupted(contents: list[bytes]):
        batch_sizes.append(len(contents))
        if len(batch_sizes) == 3:
            raise KeyboardInterrupt
        return classifier.predict(contents)

    output = f"{bucket_url}/labels.jsonl"

    def write() -> batch.Tally:
        return batch.write_predictions(
            dataclasses.replace(classifier, predict=interrupted),
            [f"{bucket_url}/pictures"],
            output,
            fingerprint="m",
            total=6,
            batch_size=2,
        )

    with pytest.raises(KeyboardInterrupt):
        write()
    assert sorted(files.list_names(bucket_url)) == ["labels.jsonl.m.partial", "pictures"]
    batch_sizes.clear()
    tally = write()
    assert (tally.images, tally.failures, batch_sizes) == (6, 0, [2])
    lines = files.read(output).decode().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [CLASS_NAMES[i % 3] for i in range(6)]
    assert sorted(files.list_names(bucket_url)) == ["labels.jsonl", "pictures"]


def test_json_lines_hold_label_and_probabilities_or_the_error():
    lines = [json.loads(line) for line in batch._json_lines(PREDICTIONS, ("cat", "dog"))]
    assert lines[0] == {
        "path": "a.jpg",
        "label": "dog",
        "probability": 0.75,
        "probabilities": {"cat": 0.25, "dog": 0.75},
    }
    assert lines[1] == {"path": "b.jpg", "error": "gone"}


def test_csv_lines_hold_label_and_probabilities_or_the_error():
    assert list(batch._csv_lines(PREDICTIONS, ("cat", "dog"))) == [
        "path,label,probability,probability of cat,probability of dog,error,novelty,is_novel",
        "a.jpg,dog,0.75,0.25,0.75,,,",
        "b.jpg,,,,,gone,,",
    ]


def test_novelty_is_in_each_kind_of_output(classifier, tmp_path):
    (tmp_path / "a.jpg").write_bytes(make_image(0))
    (tmp_path / "b.jpg").write_bytes(make_image(3))  # gray
    outputs = {}
    for name in ("x.csv", "x.jsonl"):
        batch.write_predictions(
            classifier, [str(tmp_path)], str(tmp_path.parent / name), fingerprint="f", total=2, batch_size=2
        )
        outputs[name] = (tmp_path.parent / name).read_text().splitlines()
    rows = list(csv.DictReader(outputs["x.csv"]))
    lines = [json.loads(line) for line in outputs["x.jsonl"]]
    assert [row["is_novel"] for row in rows] == ["false", "true"]
    assert [line["is_novel"] for line in lines] == [False, True]
    for row, line in zip(rows, lines, strict=True):
        assert float(row["novelty"]) == pytest.approx(line["novelty"], rel=1e-4)
        assert line["novelty"] >= 0
        assert row["label"] == line["label"]
    predictions = list(batch.predict(classifier, [line["path"] for line in lines]))
    _, known, novel = batch.format_table(predictions, CLASS_NAMES)
    assert ("unlike" in known, "unlike" in novel) == (False, True)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\n", "\uff1d"])
def test_no_cell_of_the_csv_is_a_formula(start):
    name = f"{start}cmd|' /C calc'!A0"
    prediction = Prediction(name, np.array([0.25, 0.75], np.float32))
    lines = batch._csv_lines([prediction, Prediction("b.jpg", None, name)], ("cat", name))
    _, good, bad = csv.reader(io.StringIO("\n".join(lines), newline=""))
    assert good[:3] == [f"'{name}", f"'{name}", "0.75"]
    assert bad[-3] == f"'{name}"
    (line,) = batch._json_lines([prediction], ("cat", name))
    assert (json.loads(line)["path"], json.loads(line)["label"]) == (name, name)


def test_the_table_shortens_long_paths_and_escapes_control_characters():
    predictions = [dataclasses.replace(PREDICTIONS[0], path="x" * 100), Prediction("\x1b.jpg", None, "gone")]
    _, first, second = batch.format_table(predictions, ("cat", "dog"))
    assert first.startswith("…xxx")
    assert first.endswith("x  dog         75.00%")
    assert second.startswith("\\x1b.jpg ")
    assert second.endswith("  —      gone")
