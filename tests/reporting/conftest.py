"""A finished run of the small network."""

import subprocess
import sys

import pytest

from tests.support.images import write_images
from tests.support.paths import TINY_JOB

FLAGS = [
    "--weights=none",
    "--head_epochs=0",
    "--epochs=3",
    "--image_size=32",
    "--batch_size=8",
    "--learning_rate=1e-2",
    "--precision=float32",
    "--seed=3",
]


@pytest.fixture(scope="session")
def finished_job(tmp_path_factory):
    """The job_dir of a run of three epochs."""
    root = tmp_path_factory.mktemp("reporting")
    images = write_images(root / "images", {"cat": 20, "<b>dog": 15}, noise=120)
    command = [sys.executable, TINY_JOB, f"--data_dir={images}", f"--job_dir={root / 'job'}", *FLAGS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return root / "job"
