"""trainer.evaluate with several models: a report of each, a page that compares them and tests the differences."""

import csv
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import browser
from tests.support.processes import run_command
from trainer.artifacts.job_dir import PAGE_NAME, JobDir
from trainer.storage import files

pytestmark = pytest.mark.slow


class BrightnessModel(tf.Module):
    """Predicts dog for images brighter than `threshold`, with the signatures of an exported model."""

    def __init__(self, threshold: float, names: tuple[str, str] = ("<b>cat", "dog")):
        super().__init__()
        self.threshold, self.names = threshold, names

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="bytes")])
    def classify(self, contents):
        def brightness(content):
            return tf.reduce_mean(tf.cast(tf.io.decode_png(content, channels=3), tf.float32))

        dog = tf.sigmoid((tf.map_fn(brightness, contents, tf.float32) - self.threshold) / 10)
        return {"probabilities": tf.stack([1 - dog, dog], axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="bytes")])
    def explain(self, contents):
        left = tf.constant([[1.0, 0.0], [1.0, 0.0]])
        return {**self.classify(contents), "heatmap": tf.tile(left[None], [tf.size(contents), 1, 1])}

    @tf.function(input_signature=[])
    def class_names(self):
        return {"class_names": tf.constant(self.names)}

    def save(self, directory) -> str:
        signatures = {"serving_default": self.classify, "explain": self.explain, "class_names": self.class_names}
        tf.saved_model.save(self, str(directory), signatures=signatures)
        return str(directory)


class Comparison(NamedTuple):
    report_dir: pathlib.Path
    model_dirs: list[str]
    log: str


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Images of brightness 10 to 126 are cats, of 130 to 246 dogs; three models have the thresholds 128, 137 and 300."""
    root = tmp_path_factory.mktemp("compared")
    for name, first in (("<b>cat", 10), ("dog", 130)):
        (root / "data" / name).mkdir(parents=True)
        for level in range(first, first + 120, 4):
            Image.new("RGB", (40, 30), (level, level, level)).save(root / "data" / name / f"{level}.png")
    models = [BrightnessModel(threshold).save(root / f"by_{threshold}") for threshold in (128, 137, 300)]
    report_dir = root / "r"
    process = run_command(
        "trainer.evaluate",
        f"--model_dir={','.join(models)}",
        f"--data_dir={root / 'data'}",
        f"--report_dir={report_dir}",
    )
    assert process.returncode == 0, process.stderr
    return Comparison(report_dir, models, process.stderr)


def test_each_pair_of_models_is_tested_on_the_same_images(compared):
    result = files.read_json(JobDir(str(compared.report_dir)).comparison)
    assert result["images"] == 60
    assert [model["model_dir"] for model in result["models"]] == compared.model_dirs
    assert [model["correct"] for model in result["models"]] == [60, 58, 30]  # the second predicts cat for 130 and 134
    pairs = {(pair["first"], pair["second"]): pair for pair in result["pairs"]}
    assert (pairs[0, 1]["only_first"], pairs[0, 1]["only_second"]) == (2, 0)
    assert pairs[0, 1]["p_value"] == 0.5
    assert not pairs[0, 1]["is_significant"]
    assert (pairs[0, 2]["only_first"], pairs[0, 2]["only_second"]) == (30, 0)
    assert pairs[0, 2]["p_value_holm"] == pytest.approx(3 * 2 / 2**30)
    assert pairs[0, 2]["is_significant"]
    assert pairs[0, 2]["low"] < pairs[0, 2]["difference"] == -0.5 < pairs[0, 2]["high"]
    assert "Models 1 and 2: 2 images correct only with the first, 0 only with the second" in compared.log


def test_each_model_has_a_report_with_heat_maps(compared):
    for number, accuracy in enumerate((1.0, 58 / 60, 0.5), start=1):
        paths = JobDir(str(compared.report_dir / f"model_{number}"))
        assert paths.read_metrics()["val_accuracy"] == pytest.approx(accuracy)
        assert 'class="heat"' in pathlib.Path(paths.root, PAGE_NAME).read_text()
        with open(paths.predictions, newline="") as file:
            assert len(list(csv.DictReader(file))) == 60
    maps = files.read_json(paths.heatmaps)["maps"]
    assert np.array_equal(next(iter(maps.values())), [[255, 0], [255, 0]])


@pytest.mark.parametrize(("width", "color_scheme"), [(1100, "light"), (390, "dark")])
def test_the_page_compares_the_models(chromium, compared, width, color_scheme):
    with browser.opened(chromium, compared.report_dir / PAGE_NAME, width=width, color_scheme=color_scheme) as page:
        browser.assert_nothing_overflows(page)
        browser.assert_images_are_loaded(page, at_least=24)
        for selector in ("#verdict p", "td", ".right", ".wrong", "a"):
            assert browser.contrast(page, selector) > 4.5, selector
        text = page.locator("body").inner_text()
        assert "The difference between models 1 and 2 is not significant" in text
        assert "Model 1 is more accurate than model 3, by 50.0\u00a0% of the images" in text
        assert "<b>cat" in text
        page.get_by_role("link", name="report").first.click()
        assert page.title() == "data: 100\u00a0%"


def test_the_same_model_twice_is_a_user_error(tmp_path):
    process = run_command("trainer.evaluate", "--model_dir=a,b,a/", f"--data_dir={tmp_path}", "--report_dir=r")
    assert process.returncode == 2
    assert "names a more than once" in process.stderr
