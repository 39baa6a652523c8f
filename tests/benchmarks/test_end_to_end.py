"""Suites `accuracy` and `resume` on a small network, and the child processes of all suites."""

import math
import re
import signal
import sys

import keras
import pytest

from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from trainer.benchmarks import end_to_end, results

TINY_TASK = (sys.executable, str(TINY_JOB))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", {"a": 20, "b": 20}, size=64)


@pytest.mark.slow
def test_accuracy_stops_the_article_recipe_at_its_budget(images, tmp_path):
    suite = end_to_end.accuracy_suite(
        str(images), "none", str(tmp_path), image_size=32, budget_factor=0.3, task=TINY_TASK
    )
    default, article = results.measure(suite, rounds=1)["figures"].values()
    assert 0.4 < default["best_val_accuracy"][0] <= 1
    assert article["seconds"][0] < default["seconds"][0]


@pytest.mark.parametrize(
    ("seconds_to_goal", "seconds", "expected"),
    [(40.0, 90.0, 40.0), (40.0, 100.5, 40.0), (math.inf, 100.5, 100.5), (math.inf, 90.0, math.inf)],
)
def test_only_a_recipe_that_was_killed_counts_with_its_time(seconds_to_goal, seconds, expected):
    metrics = {"seconds_to_goal": seconds_to_goal, "best_val_accuracy": 0.6, "seconds": seconds}
    assert end_to_end.within_budget(metrics, 100.0) == {**metrics, "seconds_to_goal": expected}


@pytest.mark.slow
def test_a_job_is_measured_with_and_without_features_in_the_cache(images, tmp_path):
    task = (*TINY_TASK, "--head_epochs=0", "--epochs=1", "--learning_rate=1e-3")
    suite = end_to_end.job_suite(str(images), "none", str(tmp_path), image_size=32, task=task)
    figures = results.measure(suite, rounds=1)["figures"]
    assert list(figures) == ["trainer job", "trainer job, features in the cache"]
    for metrics in figures.values():
        assert metrics["cpu_seconds"][0] > 1
        assert metrics["peak_mib"][0] > 100


def test_an_earlier_version_does_the_same_jobs(images, tmp_path):
    suite = end_to_end.job_suite(
        str(images), "imagenet", str(tmp_path), image_size=32, earlier_checkout=str(tmp_path / "earlier")
    )
    names = [baseline.name for baseline in suite.baselines]
    assert names == [
        "trainer job", "trainer job, features in the cache", "earlier job", "earlier job, features in the cache"
    ]  # fmt: skip
    calls = [baseline.measure for baseline in suite.baselines]
    assert [call.args[1] for call in calls] == [None, None, *[str(tmp_path / "earlier")] * 2]  # where they run
    removed = [[path.rpartition("/")[2] for path in call.keywords["removed"]] for call in calls]
    assert removed == [["job-0", "cache-0"], ["job-0"], ["job-1", "cache-1"], ["job-1"]]
    assert [target.numerator for target in suite.targets] == names[2:]
    assert [target.denominator for target in suite.targets] == names[:2]


@pytest.mark.slow
def test_resume_measures_first_step_and_exit(images, tmp_path):
    suite = end_to_end.resume_suite(str(images), str(tmp_path), image_size=32, task=TINY_TASK)
    for metrics in results.measure(suite, rounds=1)["figures"].values():
        assert 0 < metrics["seconds_to_first_step"][0] < metrics["seconds"][0]


@pytest.mark.slow
def test_the_article_recipe_prints_an_accuracy_for_each_epoch(images, tmp_path, monkeypatch, capsys):
    def small_backbone(weights, include_top, input_shape):
        assert (weights, include_top, input_shape) == (None, False, (32, 32, 3))
        inputs = keras.Input(input_shape)
        return keras.Model(inputs, keras.layers.AveragePooling2D(8)(inputs))

    monkeypatch.setattr(keras.applications, "ResNet50", small_backbone)
    for side in ("train", "val"):
        end_to_end.link_images(str(images), str(tmp_path / side), limit=4)
    end_to_end.train_article_recipe(str(tmp_path), "none", "32")
    accuracies = re.findall(r"^val_accuracy=(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(accuracies) == 100
    assert all(0 <= float(accuracy) <= 1 for accuracy in accuracies)


@pytest.mark.slow
def test_growth_reads_folders_of_links(images, tmp_path):
    suite = end_to_end.growth_suite(str(images), str(tmp_path), sizes=[20, 40], image_size=32)
    metrics = results.measure(suite, rounds=1)["figures"]
    assert metrics.keys() == {"20 images", "40 images"}
    assert metrics["40 images"].keys() == metrics["20 images"].keys() == {
        "list_and_split_seconds", "first_batch_seconds", "peak_mib", "seconds", "milliseconds_per_image"
    }  # fmt: skip
    assert metrics["40 images"]["peak_mib"][0] > 100
    assert len(list((tmp_path / "grown-40").rglob("*.jpg"))) == 40


@pytest.mark.parametrize(("limit", "per_class"), [(5, [3, 3]), (0, [20, 20])])
def test_linked_images_are_spread_over_the_classes(images, tmp_path, limit, per_class):
    directory = end_to_end.link_images(str(images), str(tmp_path / "linked"), limit)
    assert [len(list((tmp_path / "linked" / name).iterdir())) for name in ("a", "b")] == per_class
    assert directory == str(tmp_path / "linked")


def test_a_process_with_another_exit_code_is_an_error():
    process = end_to_end.TimedProcess([sys.executable, "-c", "print('reason'); raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="exit code 3: reason"):
        process.wait(0)


def test_a_process_runs_in_the_folder_of_its_checkout_and_its_peak_memory_is_read(tmp_path):
    code = "import os; memory = bytes(range(256)) * 2**18; print(os.getcwd(), flush=True); input()"
    process = end_to_end.TimedProcess([sys.executable, "-c", code], directory=str(tmp_path))
    process.wait_for(f"^{re.escape(str(tmp_path.resolve()))}$")
    assert 64 < process.peak_mib() < 500
    process.send_signal(signal.SIGKILL)
    process.wait(-signal.SIGKILL)
    assert process.peak_mib() == 0


def test_a_process_without_the_awaited_line_is_an_error():
    process = end_to_end.TimedProcess([sys.executable, "-c", "print('other')"])
    with pytest.raises(RuntimeError, match="without output 'first': other"):
        process.wait_for("first")


def test_a_process_is_killed_at_its_time_limit():
    process = end_to_end.TimedProcess([sys.executable, "-c", "import time; time.sleep(60)"], limit_seconds=0.1)
    assert process.wait(-signal.SIGKILL) < 30
