"""--flip=auto finds out whether left and right matter to the labels."""

import numpy as np
import pytest
from PIL import Image

from tests.support import resumable_job
from tests.support.images import write_images
from trainer.artifacts.job_dir import JobDir

pytestmark = pytest.mark.slow


def write_ramps(directory) -> None:
    """Images that become brighter to the right, again and again, and others to the left: each is the other, flipped."""
    rng = np.random.default_rng(0)
    ramp = np.tile(np.arange(0, 160, 20), 5)[None, :, None]  # [1, 40, 1]
    for name, pattern in (("left", ramp[:, ::-1]), ("right", ramp)):
        (directory / name).mkdir(parents=True)
        for i in range(60):
            shifted = np.roll(pattern, rng.integers(40), axis=1)
            pixels = shifted + rng.normal(30, 15, (40, 40, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(directory / name / f"{i}.png")


@pytest.mark.parametrize(
    ("kind", "flips", "message"),
    [("ramps", False, "left and right matter to the labels"), ("colors", True, "flips images")],
)
def test_images_are_flipped_unless_left_and_right_matter(tmp_path, kind, flips, message):
    images = tmp_path / "pictures"
    if kind == "ramps":
        write_ramps(images)
    else:
        write_images(images, {"a": 30, "b": 30}, noise=40)
    output = resumable_job.run(images, tmp_path / "job", *resumable_job.FITTED_HEAD, "--epochs=1")
    assert message in output
    assert JobDir(str(tmp_path / "job")).read_config()["resolved"]["flips"] is flips
