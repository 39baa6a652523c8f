"""A job that reaches --max_cost exports its best weights, and resumes with a higher limit."""

import pathlib
import subprocess
import sys

import pytest

from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from trainer.artifacts.job_dir import JobDir

pytestmark = pytest.mark.slow

FLAGS = ("--weights=none", "--image_size=32", "--head_epochs=0", "--epochs=100000", "--batch_size=8",
         "--price_per_hour=3600")  # fmt: skip
MAX_LIMIT = 1000


def run(images: pathlib.Path, paths: JobDir, limit: int) -> str:
    """Runs the job with a limit in seconds, which the price makes of the cost; returns its log."""
    flags = [f"--data_dir={images}", f"--job_dir={paths.root}", *FLAGS, f"--max_cost={limit}"]
    result = subprocess.run([sys.executable, TINY_JOB, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_a_job_at_its_cost_limit_exports_and_resumes(tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 20, "b": 20}, noise=90)
    paths = JobDir(str(tmp_path / "job"))
    limit = 10  # seconds, enough for one epoch on a machine without other load
    log = run(images, paths, limit)
    while paths.read_metrics() is None:
        assert "No epoch is complete, so there is no model yet" in log
        assert limit < MAX_LIMIT
        limit *= 2
        log = run(images, paths, limit)
    metrics = paths.read_metrics()
    assert "Stopped: the job has cost" in log
    assert f"the limit is --max_cost={limit}.0" in log
    assert metrics["stopped_by_cost"]
    assert metrics["cost"] >= limit
    assert (pathlib.Path(paths.saved_model) / "saved_model.pb").exists()
    assert "raise --max_cost" in run(images, paths, limit)
    assert paths.read_metrics() == metrics
    higher_limit = int(metrics["cost"]) + 5
    assert "Resuming from the checkpoint" in run(images, paths, higher_limit)
    assert paths.read_metrics()["cost"] >= higher_limit
