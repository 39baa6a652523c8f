"""Checkpoints come back as they were, and a damaged one is detected."""

import os

import numpy as np
import pytest

from trainer.artifacts.job_dir import JobDir
from trainer.training import checkpoint


def save(directory, number):
    (directory / "checkpoints").mkdir(exist_ok=True)
    writer = checkpoint.CheckpointWriter(JobDir(str(directory)))
    writer.save({"w/x": np.arange(1000.0) + number}, {"number": number})
    writer.wait()


def test_the_latest_checkpoint_is_restored_and_two_are_kept(tmp_path):
    assert checkpoint.load_latest(JobDir(str(tmp_path))) is None
    for number in range(4):
        save(tmp_path, number)
    latest = checkpoint.load_latest(JobDir(str(tmp_path)))
    assert latest.state == {"number": 3}
    np.testing.assert_array_equal(latest.arrays["w/x"], np.arange(1000.0) + 3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["000003.npz", "000004.npz"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_checkpoint_is_renamed_and_the_previous_used(tmp_path, damage):
    for number in range(2):
        save(tmp_path, number)
    path = tmp_path / "checkpoints" / "000002.npz"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes({"cut": contents[:-300], "flip": contents, "empty": b"", "text": b"text"}[damage])
    assert checkpoint.load_latest(JobDir(str(tmp_path))).state == {"number": 0}
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["000001.npz", "000002.npz.damaged"]
    save(tmp_path, 5)
    assert checkpoint.load_latest(JobDir(str(tmp_path))).state == {"number": 5}


def test_an_unwritable_checkpoint_is_raised_by_the_next_wait(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    writer = checkpoint.CheckpointWriter(JobDir(str(file)))
    writer.save({}, {})
    with pytest.raises(OSError, match="file"):
        writer.wait()
