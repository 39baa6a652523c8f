"""The measurements of docs/recipe.py, on drawn features."""

import importlib.util
import json

import numpy as np
import pytest

from tests.support.images import write_images
from tests.support.paths import ROOT


@pytest.fixture
def recipe(tmp_path):
    specification = importlib.util.spec_from_file_location("recipe", ROOT / "docs" / "recipe.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.MEASURED = tmp_path
    return module


def test_the_test_part_of_a_draw_does_not_depend_on_the_number_of_training_images(recipe):
    labels = np.repeat([0, 1, 2], [30, 20, 6])
    draws = [recipe.draw_parts(labels, size, seed=1) for size in (5, 10, None)]
    for training, validation, test in draws:
        assert len({*training, *validation, *test}) == len(training) + len(validation) + len(test)
        np.testing.assert_array_equal(test, draws[0][2])
    assert [len(part) for part in draws[2]] == [19 + 13 + 4, 5 + 3 + 1, 6 + 4 + 1]
    assert [np.bincount(labels[training]).tolist() for training, _, _ in draws[:2]] == [[4, 4, 4], [8, 8, 4]]


def test_heads_are_measured_once_for_each_number_of_images(recipe, tmp_path):
    images = write_images(tmp_path / "textures", {"a": 30, "b": 30}, size=16)
    labels = np.repeat([0.0, 1.0], 30)  # in the order of the paths
    features = np.random.default_rng(0).normal(size=(60, 4)) + 6 * labels[:, None]
    np.savez(tmp_path / "features.npz", values=features.astype(np.float32))
    small, rest = recipe.measure_heads(images, [tmp_path / "features.npz"])
    assert [(row["size"], row["training"], row["test"]) for row in (small, rest)] == [("20", 32, 12), ("all", 38, 12)]
    assert small["head"]["accuracy"] == small["logistic_regression"]["accuracy"] == 1
    (tmp_path / "heads.json").write_text(json.dumps([{"images": "textures", **rest}]))
    assert recipe.heads_table().splitlines()[-1].startswith("| textures | all | 38 | 1.000 |")


def test_recipes_are_kept_as_the_benchmark_measured_them(recipe, tmp_path, monkeypatch):
    title = "textures, all images per class, 96 pixels"
    figures = {
        label: {"test_accuracy": accuracies, "test_calibration_error": [0.05, 0.07], "seconds": [9, 10]}
        for label, accuracies in zip(recipe.COMPARED_RECIPES, ([0.5, 0.6], [0.6, 0.6], [0.4, 0.5]), strict=True)
    }
    results = tmp_path / "results"
    (results / "histories" / title).mkdir(parents=True)
    (results / "histories" / title / "finetune-0.csv").write_text("epoch,val_accuracy\n1,0.5\n2,0.75\n")
    (results / "benchmark.json").write_text(json.dumps({"suites": [{"title": title, "figures": figures}]}))
    monkeypatch.setattr("sys.argv", ["recipe.py", "recipes", str(results)])
    recipe.main()
    row = "| textures | all | 0.550 | 0.600 | **+5.0** (+10.0, +0.0) | 0.450 | 6.0, 6.0, 6.0 | 10, 10, 10 |"
    assert recipe.recipes_table().splitlines()[-1] == row
    (axes,) = recipe.draw_epochs(results / "histories").axes
    assert axes.get_title() == "textures, all images per class"
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [50, 75])
    assert (tmp_path / "recipes.png").stat().st_size > 1000
