"""Pictures that go bad after the job has looked at them, in either stage."""

import csv
import json
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.data.dataset import BadFile, read_folder
from trainer.errors import UserError
from trainer.serving import exporter
from trainer.training import stages

# The job as the command runs it, but for what happens to the folder once it has been read.
DRIVER = """
import sys
from trainer import cli, examples, task
read_folder = examples.read_folder

def read_and_spoil(data_dir, **options):
    folder = read_folder(data_dir, **options)
    import os
    os.remove(data_dir + "/a/a_003.jpg")
    with open(data_dir + "/b/b_004.jpg", "r+b") as file:
        file.truncate(600)
    return folder

examples.read_folder = read_and_spoil
command.run(task.main, define_flags=task.define_flags)
"""


@pytest.mark.slow
def test_pictures_gone_bad_in_mid_run_are_named_counted_and_not_fatal(tmp_path):
    """In the head's stage, which meets them first, and in that of all layers, which reads the files again."""
    (tmp_path / "spoiling_job.py").write_text(DRIVER)
    weights, data, job_dir = tmp_path / "random.weights.h5", tmp_path / "data", tmp_path / "job"
    keras.applications.ResNet50(weights=None, include_top=False).save_weights(weights)
    write_images(data, {"a": 20, "b": 20})
    process = run_command(
        "spoiling_job",
        *(f"--data_dir={data}", f"--job_dir={job_dir}", f"--weights={weights}", "--image_size=32", "--batch_size=8"),
        *("--head_epochs=1", "--epochs=1", "--cache=none", "--noaugment", "--max_bad_fraction=0.2"),
        PYTHONPATH=f"{tmp_path}:{':'.join(sys.path)}",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    bad = {row["path"]: row["reason"] for row in csv.DictReader((job_dir / "bad_files.csv").open(newline=""))}
    assert bad == {
        "a/a_003.jpg": "cannot be read: No such file or directory",
        "b/b_004.jpg": "truncated JPEG: the end of the picture is missing",
    }
    assert json.loads((job_dir / "metrics.json").read_text())["bad_images"] == 2


def test_too_many_pictures_gone_bad_are_the_users_error():
    folder = SimpleNamespace(examples=range(40), bad_files=())
    spoiled = SimpleNamespace(settings=SimpleNamespace(max_bad_fraction=0.01), folder=folder)
    bad_files = {name: BadFile(name, "cannot be decoded") for name in ("a", "b")}
    with pytest.raises(UserError, match=r"2 of 40 files are no readable pictures, more than --max_bad_fraction=0.01"):
        stages.check_bad_files(spoiled, bad_files)


def test_without_any_readable_validation_picture_nothing_is_exported(tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 3, "b": 3})
    validation = read_folder(str(images)).examples
    settings = SimpleNamespace(data_dir=str(images), image_size=32)
    outcome = SimpleNamespace(settings=settings, validation=validation)
    (images / "a" / "a_000.jpg").write_bytes(b"no picture any more")
    (images / "a" / "a_001.jpg").unlink()
    samples, decoded = exporter._parity_samples(outcome, np.ones(6, bool))
    assert len(samples) == len(decoded) == 4
    for path in images.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"No validation picture in .* can be read any more.*: restore them and start again"
    ):
        exporter._parity_samples(outcome, np.ones(6, bool))
