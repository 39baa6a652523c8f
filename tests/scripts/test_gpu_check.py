"""scripts/gpu_check, with a small network on the CPU of this machine."""

import os
import subprocess
import sys

import pytest
import tensorflow as tf

from tests.support import tiny_gpu_check
from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two jobs, a server and some twenty measurements
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="this machine has a GPU")
def test_without_a_gpu_each_of_its_lines_is_not_measured_and_the_rest_passes(tmp_path):
    page = tmp_path / "page.md"
    sizes = ["--image_size=32", "--batch_size=16", "--steps=1", "--rounds=1", "--images_per_class=16", "--noxla"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tiny_gpu_check", *sizes, f"--output={page}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.read_text() in done.stdout
    rows = [line.strip("| ").split("|") for line in page.read_text().splitlines() if line.startswith("| ")]
    statuses = {row[0].strip(): row[1].strip() for row in rows if len(row) == 3}
    not_measured = {name for name, status in statuses.items() if status == "not measured"}
    assert not_measured == {
        "TensorFlow sees the GPU",
        "ptxas and libdevice of the pip packages",
        "memory growth",
        "nvidia-smi during the job, with its start and its export",
        "out of memory",
        "step rates",
        "rates of features",
    }
    passed = {name for name, status in statuses.items() if status == "ok"}
    assert passed >= {
        "XLA compiles",
        "a job of two epochs, with export",
        "export and serve",
        "two replicas on one CPU",
        "logits of mixed_bfloat16",
        "logits of mixed_float16",
    }
    for precision in ("float32", "mixed_bfloat16", "mixed_float16"):
        assert f"| Keras fit, {precision} " in page.read_text()
        assert f"| trainer folded, {precision}, 1 image at a time " in page.read_text()


def test_the_lines_of_nvidia_smi_are_summarized():
    gpu_check = tiny_gpu_check.load()
    text = gpu_check.utilization_summary(["0, 5", "80, 1200", "100, 2400", "[N/A], 3", ""])
    assert text == "utilization: 90 % where it is not 0, at most 100 %; memory: at most 2400 MiB"
    assert "nothing" in gpu_check.utilization_summary([])


def test_a_check_that_fails_does_not_stop_the_others_and_is_reported():
    gpu_check = tiny_gpu_check.load()

    def check_it(setup):
        """A check."""
        yield gpu_check.Result("first", gpu_check.PASSED, "")
        raise RuntimeError("of the test")

    results = gpu_check._run_check(check_it, None)
    assert [result.status for result in results] == ["ok", "FAILED"]
    assert results[1].text == "RuntimeError: of the test"
