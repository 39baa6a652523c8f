"""Evaluation of one model on a labeled folder: what metrics.json and the report say."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.support.resumable_job import read_rows
from tests.support.tiny_model import make_image
from trainer.artifacts.job_dir import JobDir
from trainer.data.dataset import Split, read_folder
from trainer.serving import evaluation
from trainer.serving.evaluation import LabeledFolder


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Six images of each of two classes; a blue one is in the folder of green ones, and a gray one too."""
    root = tmp_path_factory.mktemp("labeled")
    for name, kinds in (("grün", [1, 1, 1, 1, 2, 3]), ("blue", [2, 2, 2, 2, 2, 2])):
        (root / name).mkdir()
        for seed, kind in enumerate(kinds):
            (root / name / f"{seed}.jpg").write_bytes(make_image(kind, seed=seed))
    folder = read_folder(str(root), max_bad_fraction=0, min_classes=1)
    return LabeledFolder(data_dir=str(root), folder=folder, batch_size=4, max_bad_fraction=0)


def test_the_refused_images_are_counted_in_the_language_of_the_report(labeled, tiny_model_dir, tmp_path):
    evaluation.evaluate_and_report([str(tiny_model_dir)], dataclasses.replace(labeled, language="es"), str(tmp_path))
    novelty = json.loads((tmp_path / "metrics.json").read_text())["novelty"]
    assert novelty == {
        "refused": 1,
        "share_refused": pytest.approx(1 / 12),
        "accuracy_of_others": pytest.approx(10 / 11),
    }
    assert "De estas imágenes, <b>1</b> (8,3 %) son nuevas" in (tmp_path / "index.html").read_text().replace(
        "\u00a0", " "
    ).replace("&nbsp;", " ")


def test_the_threshold_leaves_as_many_answers_as_have_the_precision(labeled, tiny_model_dir, tmp_path, caplog):
    required = dataclasses.replace(labeled, min_precision=0.95)
    with caplog.at_level("INFO", logger="absl"):
        evaluation.evaluate_and_report([str(tiny_model_dir)], required, str(tmp_path))
    found = json.loads((tmp_path / "metrics.json").read_text())["min_precision"]
    rows = read_rows(str(tmp_path / "predictions.csv"))
    for name, threshold in {None: found["all"], **found["per_class"]}.items():
        predicted = [row for row in rows if name in (None, row["predicted"])]
        if not predicted:
            assert threshold is None
            continue
        correct = [
            row["label"] == row["predicted"] for row in predicted if float(row["probability"]) >= threshold["threshold"]
        ]
        assert len(correct) == threshold["answered"]
        assert threshold["share_answered"] == pytest.approx(len(correct) / len(predicted))
        assert threshold["precision"] == pytest.approx(sum(correct) / len(correct))
        assert threshold["precision"] >= 0.95
    assert found["required"] == 0.95
    page = (tmp_path / "index.html").read_text()
    assert f"answer from a probability of <b>{found['all']['threshold']:.4f}</b> on" in page
    assert f"Precision 0.95, all images: from a probability of {found['all']['threshold']:.4f} on" in caplog.text


def test_the_probabilities_are_measured_and_images_that_were_trained_on_are_counted(
    labeled, tiny_model_dir, tmp_path, caplog
):
    job_dir = tmp_path / "job"
    shutil.copytree(tiny_model_dir, job_dir / "saved_model")
    examples = labeled.folder.examples
    split = Split(training=examples.take(np.arange(8)), validation=examples.take(np.arange(8, 12)))
    JobDir(str(job_dir)).write_split(split, labeled.folder.class_names)
    with caplog.at_level("INFO", logger="absl"):
        evaluation.evaluate_and_report([str(job_dir / "saved_model")], labeled, str(tmp_path / "r"))
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    others = {
        row["path"]: row["label"] == row["predicted"] for row in read_rows(str(tmp_path / "r" / "predictions.csv"))
    }
    known = set(split.training.hashes)  # of 9 images: one has the content of a training image
    others = [
        others[path] for path, content in zip(examples.paths, examples.hashes, strict=True) if content not in known
    ]
    assert metrics["trained_on"] == {"images": 9, "others": 3, "correct_of_others": sum(others)}
    assert (
        f"9 of these 12 images were trained on, so the accuracy says little about new images. On the others: {sum(others)}"
        " of 3 correct" in caplog.text
    )
    assert 0 < metrics["log_loss"] < 2
    assert 0.5 < metrics["roc_auc"] < 1
    assert 0 < metrics["expected_calibration_error"] < 0.5
    assert metrics["top_k_accuracy"] == {}  # there are three classes
