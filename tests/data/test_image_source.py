"""Images that become unreadable after the job has checked the folder, in either stage."""

import csv
import json
import sys

import keras
import numpy as np
import pytest

from tests.support.bucket import upload
from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.artifacts.job_dir import JobDir
from trainer.data import input_pipeline, splits
from trainer.data.dataset import read_folder
from trainer.data.image_source import ImageSource
from trainer.data.input_pipeline import ImageCache
from trainer.data.preprocessing import NetworkInput
from trainer.errors import UserError

# The job as the command runs it, but two files are spoiled once the folder has been read.
SPOILING_JOB = """
import os

from trainer import cli, task

read_folder = task.read_folder

def read_and_spoil(data_dir, **options):
    folder = read_folder(data_dir, **options)
    os.remove(data_dir + "/a/a_003.jpg")
    with open(data_dir + "/b/b_004.jpg", "r+b") as file:
        file.truncate(600)
    return folder

task.read_folder = read_and_spoil
cli.run(task.main, define_flags=task.define_flags)
"""


@pytest.mark.slow
def test_unreadable_images_are_named_and_do_not_stop_the_job(tmp_path):
    """The head's stage finds them first; the stage of the whole network reads the files again."""
    (tmp_path / "spoiling_job.py").write_text(SPOILING_JOB)
    weights, data, paths = tmp_path / "random.weights.h5", tmp_path / "data", JobDir(str(tmp_path / "job"))
    keras.applications.ResNet50(weights=None, include_top=False).save_weights(weights)
    write_images(data, {"a": 20, "b": 20})
    process = run_command(
        "spoiling_job",
        f"--data_dir={data}",
        f"--job_dir={paths.root}",
        f"--weights={weights}",
        "--image_size=32",
        "--batch_size=8",
        "--head_epochs=1",
        "--epochs=1",
        "--cache=none",
        "--noaugment",
        "--max_bad_fraction=0.2",
        PYTHONPATH=f"{tmp_path}:{':'.join(sys.path)}",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    with open(paths.bad_files, newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == {"a/a_003.jpg", "b/b_004.jpg"}
    assert reasons["a/a_003.jpg"] == "cannot be read: No such file or directory"
    assert reasons["b/b_004.jpg"].startswith("truncated JPEG")
    with open(paths.metrics) as file:
        assert json.load(file)["bad_images"] == 2


@pytest.fixture
def source(tmp_path):
    """Twenty images, of which at most a tenth may be bad."""
    return make_source(write_images(tmp_path, {"a": 10, "b": 10}))


def make_source(data, labels_file: str = "") -> ImageSource:
    folder = read_folder(str(data), labels_file=labels_file)
    return ImageSource(
        str(data),
        folder,
        splits.split_by_content(folder.examples, 0.2),
        network_input=NetworkInput(image_size=32, resize="stretch", preprocessing="caffe"),
        cache=ImageCache(False),
        cache_dir="",
        read_parallelism=0,
        max_bad_fraction=0.1,
    )


def test_an_unreadable_image_is_recorded_with_its_present_reason(source, tmp_path):
    (tmp_path / "a" / "a_000.jpg").write_bytes(b"")
    (tmp_path / "b" / "b_000.jpg").unlink()
    source.record_unreadable(["a/a_000.jpg", "b/b_000.jpg", "a/a_000.jpg"])
    source.check_bad_fraction()
    assert {path: bad.reason for path, bad in source.bad_files.items()} == {
        "a/a_000.jpg": "empty file",
        "b/b_000.jpg": "cannot be read: No such file or directory",
    }


def test_a_label_file_may_name_images_on_disk_and_in_a_bucket(tmp_path, bucket_url):
    data = write_images(tmp_path / "data", {"a": 3, "b": 3})
    url = upload(data, f"{bucket_url}/data")
    paths = sorted(path.relative_to(data) for path in data.rglob("*.jpg"))
    rows = [f"{f'{url}/{path}' if path.parent.name == 'b' else path},{path.parent.name}\n" for path in paths]
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(rows))
    sources = [make_source(data), make_source(data, str(tmp_path / "labels.csv"))]
    expected, actual = (
        input_pipeline.decode_all(source.source(np.arange(6)), "", lambda count: None).values.numpy()
        for source in sources
    )
    assert sources[1].paths.tolist() == [row.split(",")[0] for row in rows]
    np.testing.assert_array_equal(actual, expected)
    sources[1].record_unreadable([f"{url}/b/gone.jpg"])
    assert "empty file" in sources[1].bad_files[f"{url}/b/gone.jpg"].reason


def test_too_many_unreadable_images_are_the_users_error(source):
    source.record_unreadable(["a/a_000.jpg", "a/a_001.jpg", "b/b_000.jpg"])
    with pytest.raises(UserError, match=r"3 of 20 files are not readable images, more than --max_bad_fraction=0\.1"):
        source.check_bad_fraction()


def test_all_images_are_in_order_and_split_by_position(source):
    assert source.paths.tolist() == sorted(source.paths)
    training, validation = (source.paths[index].tolist() for index in source.split_indices)
    assert len(training) == 16
    assert sorted(training + validation) == source.paths.tolist()
