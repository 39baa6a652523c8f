"""Several models on the same pictures: what differs is counted, tested and shown."""

import csv
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import browser
from tests.support.processes import run_command

pytestmark = pytest.mark.slow


class ByBrightness(tf.Module):
    """Calls a picture a dog if it is brighter than `threshold`, with the signatures of an exported model."""

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


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Pictures of brightness 10 to 126 are cats, of 130 to 246 dogs; three models with thresholds of 128, 137 and 300."""
    root = tmp_path_factory.mktemp("compared")
    for name, first in (("<b>cat", 10), ("dog", 130)):
        (root / "data" / name).mkdir(parents=True)
        for level in range(first, first + 120, 4):
            Image.new("RGB", (40, 30), (level, level, level)).save(root / "data" / name / f"{level}.png")
    models = [ByBrightness(threshold).save(root / f"by_{threshold}") for threshold in (128, 137, 300)]
    answer = run_command(
        "trainer.evaluate",
        f"--model_dir={','.join(models)}",
        f"--data_dir={root / 'data'}",
        f"--report_dir={root / 'r'}",
    )
    assert answer.returncode == 0, answer.stderr
    return root / "r", models, answer


def test_each_pair_is_counted_and_tested_on_the_same_pictures(compared):
    result = json.loads((compared[0] / "comparison.json").read_text())
    assert result["images"] == 60
    assert [model["model_dir"] for model in result["models"]] == compared[1]
    assert [model["correct"] for model in result["models"]] == [60, 58, 30]  # 130 and 134 are cats to the second
    pairs = {(pair["first"], pair["second"]): pair for pair in result["pairs"]}
    assert (pairs[0, 1]["only_first"], pairs[0, 1]["only_second"]) == (2, 0)
    assert pairs[0, 1]["p_value"] == 0.5
    assert not pairs[0, 1]["is_significant"]
    assert (pairs[0, 2]["only_first"], pairs[0, 2]["only_second"]) == (30, 0)
    assert pairs[0, 2]["p_value_holm"] == pytest.approx(3 * 2 / 2**30)
    assert pairs[0, 2]["is_significant"]
    assert pairs[0, 2]["low"] < pairs[0, 2]["difference"] == -0.5 < pairs[0, 2]["high"]
    assert "Models 1 and 2: only the first right 2, only the second 0" in compared[2].stderr


def test_each_model_has_the_report_of_a_single_evaluation_with_where_it_looked(compared):
    for number, accuracy in enumerate((1.0, 58 / 60, 0.5), start=1):
        folder = compared[0] / f"model_{number}"
        assert json.loads((folder / "metrics.json").read_text())["val_accuracy"] == pytest.approx(accuracy)
        assert 'class="heat"' in (folder / "index.html").read_text()
        with open(folder / "predictions.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == 60
    maps = json.loads((folder / "gradcam.json").read_text())["maps"]
    assert np.array_equal(next(iter(maps.values())), [[255, 0], [255, 0]])


@pytest.mark.parametrize(("width", "color_scheme"), [(1100, "light"), (390, "dark")])
def test_the_page_sets_the_models_side_by_side(chromium, compared, width, color_scheme):
    with browser.opened(chromium, compared[0] / "index.html", width=width, color_scheme=color_scheme) as page:
        browser.assert_nothing_sticks_out(page)
        browser.assert_pictures_are_loaded(page, at_least=24)
        for selector in ("#verdict p", "td", ".right", ".wrong", "a"):
            assert browser.contrast(page, selector) > 4.5, selector
        text = page.locator("body").inner_text()
        assert "These pictures do not tell models 1 and 2 apart" in text
        assert "Model 1 is right more often than model 3, by 50.0\u00a0% of the pictures" in text
        assert "<b>cat" in text
        page.get_by_role("link", name="report").first.click()
        assert page.title() == "data: 100.00\u00a0%"


def test_the_same_model_twice_is_the_users_error(tmp_path):
    answer = run_command("trainer.evaluate", "--model_dir=a,b,a/", f"--data_dir={tmp_path}", "--report_dir=r")
    assert answer.returncode == 2
    assert "names a more than once" in answer.stderr
