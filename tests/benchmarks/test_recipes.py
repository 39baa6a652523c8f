"""The comparison of recipes, with a small network in place of ResNet50 where the trainer runs."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from trainer.benchmarks import recipes, results
from trainer.benchmarks.suite import RECIPES
from trainer.data import preprocessing


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "colors", {"a": 20, "b": 25}, noise=60)


def files_in(root, part: str) -> set[str]:
    return {str(path.relative_to(root / part)) for path in (root / part).rglob("*.jpg")}


def test_the_test_part_is_a_fifth_that_no_size_sees(images, tmp_path):
    small, whole = (tmp_path / name for name in ("small", "whole"))
    for work_dir, size in ((small, 6), (whole, 0)):
        recipes.draw_folder(str(images), str(work_dir), size, seed=3)
    assert files_in(small / "3", "test") == files_in(whole / "3", "test")
    assert len(files_in(small / "3", "test")) == 4 + 5
    assert len(files_in(small / "3", "train")) == 12
    assert files_in(small / "3", "train") < files_in(whole / "3", "train")
    assert not files_in(whole / "3", "train") & files_in(whole / "3", "test")
    assert len(files_in(whole / "3", "train")) == 45 - 9


def suite_of(images, directory, names: list[str], **changed):
    [suite] = recipes.recipe_suites(
        [str(images)],
        "none",
        str(directory),
        history_dir=str(directory / "histories"),
        image_size=32,
        sizes=[12],
        names=names,
        limit_seconds=changed.pop("limit_seconds", 600),
        **changed,
    )
    return suite


def test_logistic_regression_reads_large_images_by_area_as_the_trainer_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    for name, image in zip("ab", pixels, strict=True):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "image.png")
    inputs, labels = recipes.network_inputs(str(tmp_path), 32)
    blue_green_red = pixels.reshape(2, 32, 4, 32, 4, 3).mean(axis=(2, 4))[..., ::-1]
    np.testing.assert_allclose(next(iter(inputs)) + preprocessing.IMAGENET_BGR_MEANS, blue_green_red, atol=0.51)
    np.testing.assert_array_equal(labels, [0, 1])


@pytest.mark.slow
def test_the_trainer_and_logistic_regression_see_the_same_images(images, tmp_path):
    weights = tmp_path / "given.weights.h5"  # not loaded by the small network, but its name must not be none
    weights.write_bytes(b"")
    flags = ["--batch_size=8", "--preprocessing=rescale"]
    [suite] = recipes.recipe_suites(
        [str(images)],
        str(weights),
        str(tmp_path),
        history_dir=str(tmp_path / "histories"),
        image_size=32,
        sizes=[12],
        names=["default"],
        limit_seconds=600,
        task=(sys.executable, str(TINY_JOB), *flags),
    )
    measured = results.measure(suite, rounds=1)
    assert measured["title"] == "colors, 12 images per class, 32 pixels"
    [accuracy] = measured["figures"]["trainer --recipe=head"]["test_accuracy"]
    assert accuracy >= 7 / 9
    [history] = (tmp_path / "histories").rglob("head-0.csv")
    assert "val_accuracy" in history.read_text()
    measured = results.measure(suite_of(images, tmp_path / "other", ["logistic_regression"]), rounds=1)
    [metrics] = measured["figures"].values()
    assert 0 <= metrics["test_accuracy"][0] <= 1
    assert 0 <= metrics["test_calibration_error"][0] <= 1
    assert "| test accuracy" in results.suite_table(measured)


@pytest.mark.slow
@pytest.mark.parametrize("train", [recipes.train_keras_guide, recipes.train_article])
def test_a_recipe_of_keras_prints_its_test_accuracy_after_each_epoch(images, tmp_path, capsys, monkeypatch, train):
    for name in ("GUIDE_HEAD_EPOCHS", "GUIDE_EPOCHS"):
        monkeypatch.setattr(recipes, name, 1)
    monkeypatch.setattr(recipes, "ARTICLE_EPOCHS", 2)
    root = recipes.draw_folder(str(images), str(tmp_path), 6, seed=0)
    train(root, "none", "32", "0")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("metrics ")]
    assert len(lines) == 2
    for line in lines:
        metrics = json.loads(line.removeprefix("metrics "))
        assert metrics["test_accuracy"] * 9 == pytest.approx(round(metrics["test_accuracy"] * 9))


def test_every_recipe_is_measured_in_the_order_of_the_table(images, tmp_path):
    suite = suite_of(images, tmp_path, list(reversed(RECIPES)))
    assert [baseline.name for baseline in suite.baselines] == [recipes._label(name) for name in RECIPES]
