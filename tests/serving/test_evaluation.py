"""Evaluation of one model on a labeled folder: what metrics.json and the report say."""

import json

import pytest

from tests.support.tiny_model import make_image
from trainer.data.dataset import read_folder
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


def test_the_refused_images_are_counted(labeled, tiny_model_dir, tmp_path):
    evaluation.evaluate_and_report([str(tiny_model_dir)], labeled, str(tmp_path))
    novelty = json.loads((tmp_path / "metrics.json").read_text())["novelty"]
    assert novelty == {
        "refused": 1,
        "share_refused": pytest.approx(1 / 12),
        "accuracy_of_others": pytest.approx(10 / 11),
    }
    assert "<b>1</b> (8.3 %)" in (tmp_path / "index.html").read_text().replace("\u00a0", " ").replace("&nbsp;", " ")
