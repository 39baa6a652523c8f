"""Files and saves are whole or absent, and damage is noticed."""

import os
import pathlib
import threading

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.storage import files
from trainer.training import checkpoint, feature_cache
from trainer.training.loop import ModelOutputs


def test_a_write_that_fails_leaves_what_stood_there_and_nothing_beside_it(tmp_path):
    path = str(tmp_path / "a.json")
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.atomic_path(path) as temporary:
        files.atomic_write(temporary, b"half of it")
        raise ZeroDivisionError
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_reader_never_sees_half_of_a_file(tmp_path):
    path = str(tmp_path / "a")
    contents = [bytes([i]) * 2_000_000 for i in range(2)]
    files.atomic_write(path, contents[0])
    done = threading.Event()

    def write():
        for i in range(40):
            files.atomic_write(path, contents[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set():
        assert files.read(path) in contents
        seen += 1
    writer.join()
    assert seen


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    directory = str(tmp_path / "model")
    for text in ("one", "two"):
        with files.atomic_directory(directory) as temporary:
            os.mkdir(temporary)
            files.atomic_write(f"{temporary}/{text}", text)
    assert os.listdir(directory) == ["two"]
    with pytest.raises(ZeroDivisionError), files.atomic_directory(directory) as temporary:
        os.mkdir(temporary)
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(directory) == ["two"]


def save(directory, number):
    saver = checkpoint.CheckpointWriter(str(directory))
    saver.save({"w/x": np.arange(1000.0) + number}, {"number": number})
    saver.wait()


def test_the_newest_save_comes_back_as_it_was_and_two_are_kept(tmp_path):
    assert checkpoint.load_latest(str(tmp_path)) is None
    for number in range(4):
        save(tmp_path, number)
    newest = checkpoint.load_latest(str(tmp_path))
    assert newest.state == {"number": 3}
    np.testing.assert_array_equal(newest.arrays["w/x"], np.arange(1000.0) + 3)
    assert sorted(os.listdir(tmp_path)) == ["000003.npz", "000004.npz"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_save_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    for number in range(2):
        save(tmp_path, number)
    path = tmp_path / "000002.npz"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes({"cut": contents[:-300], "flip": contents, "empty": b"", "text": b"text"}[damage])
    assert checkpoint.load_latest(str(tmp_path)).state == {"number": 0}
    assert sorted(os.listdir(tmp_path)) == ["000001.npz", "000002.npz.damaged"]
    save(tmp_path, 5)
    assert checkpoint.load_latest(str(tmp_path)).state == {"number": 5}


def test_a_save_that_cannot_be_written_is_told_by_the_next_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    saver = checkpoint.CheckpointWriter(str(file / "checkpoints"))
    saver.save({}, {})
    with pytest.raises(OSError, match="file"):
        saver.wait()


def test_features_are_computed_once_and_damaged_ones_again(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "EXAMPLES_PER_PART", 4)
    asked = []

    def compute(start, stop):
        asked.append((start, stop))
        return ModelOutputs(np.arange(start, stop, dtype=np.float32)[:, None], np.ones(stop - start, bool))

    def get(name="k"):
        return feature_cache.load_or_compute(str(tmp_path), name, 10, compute, is_chief=True).values.ravel().tolist()

    assert get() == list(range(10))
    assert asked == [(0, 4), (4, 8), (8, 10)]
    assert get() == list(range(10))
    assert len(asked) == 3
    (tmp_path / "features-k-000000004.npz").write_bytes(b"damaged")
    assert get() == list(range(10))
    assert asked[3:] == [(4, 8)]
    get(feature_cache.cache_key("other"))
    assert len(asked) == 7


@pytest.mark.parametrize(
    ("address", "message"), [("s3://bucket/x", "pass a local path or gs://"), ("gs:///x", "names no bucket")]
)
def test_an_address_that_names_no_bucket_is_the_users_error(address, message):
    from trainer.storage import gcs

    with pytest.raises(UserError, match=message):
        gcs.split_url(address)


def test_a_file_that_has_to_be_there_is_missed_by_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        files.read_existing(str(tmp_path / "gone"))
    assert caught.value.filename == str(tmp_path / "gone")


def test_what_killed_writers_left_is_deleted_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("model.h5", ".hidden", ".1-2", "1-2-model.h5")]
    for path in kept:
        path.touch()
    killed = pathlib.Path(files._temporary_name(str(tmp_path / "model.h5")))
    killed.write_text("half")
    killed_tree = pathlib.Path(files._temporary_name(str(tmp_path / "saved_model")))
    killed_tree.mkdir()
    (killed_tree / "saved_model.pb").write_text("half")
    files.remove_partial_files(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted(kept)
