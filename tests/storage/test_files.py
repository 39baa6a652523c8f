"""Writes are atomic on a local disk and in a bucket, and reads report missing files."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from trainer.storage import files, gcs


def test_a_failed_write_keeps_the_previous_file(tmp_path):
    path = str(tmp_path / "a.json")
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.atomic_path(path) as temporary:
        files.atomic_write(temporary, b"partial")
        raise ZeroDivisionError
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_reader_never_sees_a_partial_file(tmp_path):
    path = str(tmp_path / "a")
    contents = [bytes([i]) * 2_000_000 for i in range(2)]
    files.atomic_write(path, contents[0])
    is_done = threading.Event()

    def write():
        for i in range(40):
            files.atomic_write(path, contents[i % 2])
        is_done.set()

    writer = threading.Thread(target=write)
    writer.start()
    num_reads = 0
    while not is_done.is_set():
        assert files.read(path) in contents
        num_reads += 1
    writer.join()
    assert num_reads


def test_a_directory_replaces_the_previous_one(tmp_path):
    directory = str(tmp_path / "model")
    for name in ("one", "two"):
        with files.atomic_directory(directory) as temporary:
            os.mkdir(temporary)
            files.atomic_write(files.join(temporary, name), name)
    assert os.listdir(directory) == ["two"]
    with pytest.raises(ZeroDivisionError), files.atomic_directory(directory) as temporary:
        os.mkdir(temporary)
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(directory) == ["two"]


def test_a_missing_file_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        files.read_existing(str(tmp_path / "missing"))
    assert caught.value.filename == str(tmp_path / "missing")


def test_only_temporary_files_of_killed_writers_are_removed(tmp_path):
    others = [tmp_path / name for name in ("model.h5", ".hidden", ".1-2", "1-2-model.h5")]
    for path in others:
        path.touch()
    partial_file = pathlib.Path(files._temporary_name(str(tmp_path / "model.h5")))
    partial_file.write_text("partial")
    partial_directory = pathlib.Path(files._temporary_name(str(tmp_path / "saved_model")))
    partial_directory.mkdir()
    (partial_directory / "saved_model.pb").write_text("partial")
    files.remove_partial_files(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_the_next_writer_removes_what_a_killed_one_left_of_the_same_file(tmp_path):
    code = """
import os, signal, sys
from trainer.storage import files
for name in ("a.txt", "b.txt"):
    with files.atomic_path(os.path.join(sys.argv[1], name)) as path:
        open(path, "w").close()
        if name == "b.txt":
            os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    files.atomic_write(str(tmp_path / "a.txt"), "")
    assert len(list(tmp_path.iterdir())) == 2  # of another file, that is left alone
    of_running = f".{os.getppid()}-{files._host_number()}-1-b.txt"
    (tmp_path / of_running).touch()
    files.atomic_write(str(tmp_path / "b.txt"), "")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt", of_running}


def test_objects_are_read_listed_renamed_and_removed(bucket_url):
    path = files.join(bucket_url, "a/b")
    assert files.read(path) is None
    assert not files.exists(path)
    contents = os.urandom(9_000_000)  # above 8 MB the client uses a resumable upload
    files.atomic_write(path, contents)
    assert files.read(path) == contents
    assert files.read_range(path, 5, 9) == contents[5:9]
    assert files.exists(f"{bucket_url}/a")
    assert files.list_names(f"{bucket_url}/a") == ["b"]
    files.rename(path, path + ".damaged")
    assert files.list_names(f"{bucket_url}/a") == ["b.damaged"]
    files.remove(path + ".damaged")
    assert files.list_names(f"{bucket_url}/a") == []


@pytest.mark.parametrize("end", ["", "/"])
def test_a_saved_model_in_a_bucket_is_complete_or_missing(bucket_url, end):
    url = f"{bucket_url}/model{end}"
    for names in (["variables/one", "saved_model.pb"], ["variables/two", "fingerprint.pb", "saved_model.pb"]):
        bucket_url.emulator.control(forget=True)
        with files.atomic_directory(url) as temporary:
            for name in names:
                files.make_directory(os.path.dirname(files.join(temporary, name)))
                files.atomic_write(files.join(temporary, name), name)
            assert not [method for method, *_ in bucket_url.emulator.requests() if method == "POST"]
        assert sorted(gcs.list_tree(url)) == sorted(names)
        changes = [(method, path) for method, path, _ in bucket_url.emulator.requests() if method in ("POST", "DELETE")]
        is_replacement = "variables/two" in names
        assert changes[0][0] == ("DELETE" if is_replacement else "POST")
        assert ("saved_model.pb" in changes[0][1]) == is_replacement
    with pytest.raises(ZeroDivisionError), files.atomic_directory(url) as temporary:
        raise ZeroDivisionError
    assert files.read(f"{bucket_url}/model/saved_model.pb") == b"saved_model.pb"
