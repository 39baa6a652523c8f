"""Each suite of trainer.benchmark runs and its figures are what they say; at sizes that tell nothing about speed."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support import tiny_job
from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from tests.support.processes import run_command
from trainer.benchmarks import bucket, results
from trainer.data.dataset import read_folder

SCRIPT = TINY_JOB

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 20, "b": 20}, size=64)


def test_the_command_leaves_a_table_a_chart_and_the_figures(images, tmp_path):
    flags = ["--suite=growth,input", "--rounds=1", "--image_size=32", "--large_pictures=2", "--growth_sizes=20,40"]
    answer = run_command(
        "trainer.benchmark", f"--data_dir={images}", f"--output_dir={tmp_path}", *flags, "--note=On a shared machine."
    )
    assert answer.returncode == 0, answer.stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())
    growth, small, large = results["suites"]
    assert growth["figures"].keys() == {"20 pictures", "40 pictures"}
    assert all(min(values) > 0 for values in growth["figures"]["40 pictures"].values())
    assert growth["figures"]["40 pictures"]["peak_mib"][0] > 100
    for suite in (small, large):
        assert "image_dataset_from_directory" in suite["figures"]
        for figures in suite["figures"].values():
            assert len(figures["images_per_second"]) == 1
            assert min(figures["images_per_second"] + figures["cpu_seconds_per_1000"]) > 0
    text = (tmp_path / "benchmark.md").read_text()
    assert "On a shared machine." in text
    assert results["machine"]["processor"] in text
    assert f"tensorflow-cpu {results['machine']['versions']['tensorflow-cpu']}" in text
    assert "| our CPU time against the plain decode's | at most 1.15 |" in text
    assert "## growth" in answer.stdout
    # What another run leaves in the same folder is kept, unless it is of another machine.
    assert [suite["suite"] for suite in results.earlier(str(tmp_path), but=["growth"])] == ["input", "input"]
    elsewhere = {**results, "machine": {**results["machine"], "cores": 1000}}
    (tmp_path / "benchmark.json").write_text(json.dumps(elsewhere))
    assert results.earlier(str(tmp_path), but=["growth"]) == []
    with Image.open(tmp_path / "benchmark.png") as chart:
        assert chart.width > 800
        assert len(np.unique(np.asarray(chart.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_step_compares_our_loop_with_keras_fit_and_tells_what_it_leaves_out(images):
    from trainer.benchmarks import training_step
    from trainer.data import listing

    paths = listing.list_files(str(images)).paths
    numbers = {"image_size": 32, "batch_size": 4, "steps": 2}
    suite = training_step.step_suite(
        str(images), np.array(paths), half="mixed_bfloat16", with_xla=False, build=tiny_job.build, **numbers
    )
    result = results.measure(suite, rounds=1)
    assert result["figures"].keys() >= {"our loop, float32", "Keras fit, mixed_bfloat16"}
    assert 0 <= result["figures"]["our loop on files, mixed_bfloat16"]["input_wait_share"][0] < 1
    assert len(result["aims"]) == 3
    left_out = results.suite_table(result)
    assert "Left out: XLA: --noxla is set." in left_out


def test_accuracy_and_resume_time_real_processes(images, tmp_path):
    from trainer.benchmarks import end_to_end

    task = (sys.executable, str(SCRIPT))
    suite = end_to_end.accuracy_suite(str(images), "none", str(tmp_path), image_size=32, budget_factor=0.3, task=task)
    result = results.measure(suite, rounds=1)
    ours, articles = result["figures"].values()
    assert 0.4 < ours["best_val_accuracy"][0] <= 1
    assert articles["seconds"][0] < ours["seconds"][0]  # it was ended when its budget was
    suite = end_to_end.resume_suite(str(images), str(tmp_path), image_size=32, task=task)
    result = results.measure(suite, rounds=1)
    for figures in result["figures"].values():
        assert 0 < figures["seconds_to_first_step"][0] < figures["seconds"][0]


def test_bucket_takes_the_figures_of_its_measurement(images, tmp_path):
    """The emulated bucket is test_bucket.py's; here the same code reads from disk."""
    from trainer import pack

    folder = read_folder(str(images))
    pack.pack(folder, lambda path: (images / path).read_bytes(), str(tmp_path), shard_bytes=10**6)
    result = results.measure(bucket.bucket_suite(str(images), str(images), str(tmp_path), image_size=32), 1)
    assert list(result["figures"]) == ["local disk", "one by one", "folder", "shards", "cache"]
    assert all(figures["images_per_second"][0] > 0 for figures in result["figures"].values())


def test_ratios_are_taken_round_by_round():
    from trainer.benchmarks.suite import Baseline, Suite, Target

    fast, slow = iter([1.0, 10.0, 100.0]), iter([2.0, 20.0, 50.0])
    baselines = [Baseline("f", lambda: {"s": next(fast)}), Baseline("g", lambda: {"s": next(slow)})]
    targets = [Target("met", "s", "g", "f", 2.0), Target("missed", "s", "g", "f", 1.9, at_least=False)]
    result = results.measure(Suite("x", "x", "s", baselines, targets, []), rounds=3)
    assert [(target["ratio"], target["is_met"]) for target in result["aims"]] == [(2.0, True), (2.0, False)]
