"""What a job can learn depends on --resize where classes differ by proportions alone."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.support.paths import TINY_JOB
from trainer.artifacts.job_dir import JobDir

pytestmark = pytest.mark.slow

LONG, SHORT = (
    1024,
    256,
)  # pixels of the frames: 4 to 1, and so large that resizing averages over pixels in both directions


def write_shapes(directory: pathlib.Path, *, images_per_class: int) -> pathlib.Path:
    """Circles, and ellipses of 16 to 1 along the frame, in lying and standing frames.

    Stretched to a square, a circle in a lying frame is a standing ellipse of 1 to 4, and so is an ellipse in a standing
    frame, with the same distribution of sizes: the stretched classes are equal.
    """
    rng = np.random.default_rng(0)
    for name in ("circle", "ellipse"):
        (directory / name).mkdir(parents=True)
        for index in range(images_per_class):
            width, height = (SHORT, SHORT) if name == "circle" else (LONG, LONG / 16)
            half = rng.uniform(0.25, 0.45)  # of the width and height
            image = Image.new("RGB", (LONG, SHORT), (20, 20, 20))
            left, top = LONG / 2 - half * width, SHORT / 2 - half * height
            ImageDraw.Draw(image).ellipse((left, top, LONG - left, SHORT - top), fill=(230, 230, 230))
            upright = image if index % 2 else image.transpose(Image.Transpose.TRANSPOSE)
            upright.save(directory / name / f"{name}_{index:03d}.png")
    return directory


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", images_per_class=100)


def val_accuracy(shapes: pathlib.Path, job_dir: pathlib.Path, resize: str) -> float:
    flags = [f"--data_dir={shapes}", f"--job_dir={job_dir}", f"--resize={resize}", "--weights=none", "--image_size=64",
             "--head_epochs=0", "--epochs=20", "--batch_size=16", "--learning_rate=0.02", "--noaugment",
             "--preprocessing=rescale", "--dropout=0"]  # fmt: skip
    process = subprocess.run([sys.executable, TINY_JOB, *flags], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(pathlib.Path(JobDir(str(job_dir)).metrics).read_text())["val_accuracy"]


def test_circles_and_ellipses_in_long_frames_are_learned_only_with_their_proportions(shapes, tmp_path):
    accuracies = {resize: val_accuracy(shapes, tmp_path / resize, resize) for resize in ("pad", "stretch")}
    assert accuracies["pad"] >= 0.95, accuracies
    assert accuracies["stretch"] <= 0.75, accuracies  # the best of 20 epochs of guesses for 40 images
