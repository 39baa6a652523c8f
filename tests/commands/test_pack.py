"""Packed shards are the folder they came from: the same pictures, split and batches; whole, resumable, checked."""

import os
import shutil

import numpy as np
import pytest

from tests.storage.test_gcs import same_folder, upload
from tests.support.images import write_images
from trainer import pack
from trainer.data import input_pipeline, shards, splits
from trainer.data.dataset import read_folder
from trainer.errors import UserError
from trainer.storage import files

SHARD_BYTES = 20_000


@pytest.fixture
def folder(tmp_path):
    directory = write_images(tmp_path / "data", {"cat": 30, "dog": 25})
    (directory / "dog" / "empty.jpg").write_bytes(b"")
    (directory / "dog" / "again.jpg").write_bytes((directory / "dog" / "dog_000.jpg").read_bytes())
    return str(directory)


def make(folder: str, output_dir: str, read=None) -> int:
    found = read_folder(folder)
    read = read or (lambda path: shards.read(folder, path))
    return pack.pack(found, read, output_dir, shard_bytes=SHARD_BYTES)


def contents_of(directory) -> dict[str, bytes]:
    return {name: files.read(f"{directory}/{name}") for name in files.list_names(str(directory))}


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_shards_are_the_folder_they_came_from(folder, tmp_path, bucket_url, where):
    source = upload(tmp_path / "data", f"{bucket_url}/data") if where == "bucket" else folder
    packed = f"{bucket_url}/packed" if where == "bucket" else str(tmp_path / "packed")
    assert make(source, packed) > 3
    found = read_folder(packed)
    original = read_folder(folder)
    same_folder(found, original)
    sides = [splits.split_by_content(one.examples, 0.2) for one in (found, original)]
    assert splits.fingerprint(sides[0], found.class_names) == splits.fingerprint(sides[1], found.class_names)
    read = shards.fetch(found.pack, "", lambda count: None)
    for path in original.examples.paths:
        expected = files.read(f"{folder}/{path}")
        assert read(path) == expected
        assert shards.read(packed, path) == expected


@pytest.mark.parametrize("contents", [None, b"another picture"])
def test_a_picture_that_is_gone_or_another_while_it_is_packed_ends_it_without_a_shard(folder, tmp_path, contents):
    with pytest.raises(UserError, match=r"'(cat|dog)/.*' changed while it was packed: start again"):
        make(folder, str(tmp_path / "packed"), read=lambda path: contents)
    assert not list((tmp_path / "packed").glob("*.tfrecord"))


def test_the_same_folder_gives_the_same_bytes_in_any_tool_that_reads_tfrecord(folder, tmp_path):
    import tensorflow as tf

    for name in ("one", "two"):
        make(folder, str(tmp_path / name))
    assert contents_of(tmp_path / "one") == contents_of(tmp_path / "two")
    found_files = sorted(str(path) for path in (tmp_path / "one").glob("*.tfrecord"))
    labels = {}
    for serialized in tf.data.TFRecordDataset(found_files):
        feature = tf.train.Example.FromString(serialized.numpy()).features.feature
        name = feature["image/filename"].bytes_list.value[0].decode()
        labels[name] = feature["image/class/text"].bytes_list.value[0].decode()
    assert len(labels) == 56
    assert all(name.startswith(label + "/") for name, label in labels.items())


def test_an_interrupted_pack_goes_on_after_its_last_whole_shard(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "WRITTEN_TOGETHER", 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make(folder, str(whole))
    asked = []

    def read(path):
        asked.append(path)
        if len(asked) == 30:
            raise ZeroDivisionError
        return shards.read(folder, path)

    with pytest.raises(ZeroDivisionError):
        make(folder, str(broken), read)
    assert shards.open_pack(str(broken)) is None
    done = {path.name: path.stat().st_mtime_ns for path in broken.glob("*.tfrecord")}
    assert 0 < len(done) < len(list(whole.glob("*.tfrecord")))
    make(folder, str(broken), read)
    assert {name: os.stat(broken / name).st_mtime_ns for name in done} == done
    assert contents_of(broken) == contents_of(whole)


def test_a_damaged_shard_is_noticed_and_mended(folder, tmp_path):
    packed = tmp_path / "packed"
    make(folder, str(packed))
    before = contents_of(packed)
    found = read_folder(str(packed))
    damaged = next(iter(found.pack.records))
    path = packed / shards.shard_name(damaged.shard)
    contents = bytearray(path.read_bytes())
    contents[damaged.offset + 40] ^= 1
    path.write_bytes(contents)
    read = shards.fetch(found.pack, "", lambda count: None)
    assert [record.path for record in found.pack.records if not read(record.path)] == [damaged.path]
    make(folder, str(packed))
    assert contents_of(packed) == before
    (packed / shards.shard_name(0).replace(".tfrecord", ".csv")).unlink()
    shards.open_pack.cache_clear()
    with pytest.raises(UserError, match=r"holds \d+ of 56 pictures .* run trainer.pack again"):
        read_folder(str(packed))


def test_other_pictures_are_not_mixed_into_a_pack(folder, tmp_path):
    make(folder, str(tmp_path / "packed"))
    os.remove(f"{folder}/cat/cat_001.jpg")
    with pytest.raises(UserError, match="holds shards of other pictures"):
        make(folder, str(tmp_path / "packed"))


@pytest.mark.slow
def test_batches_from_shards_are_those_of_the_folder(folder, tmp_path):
    make(folder, str(tmp_path / "packed"))
    images = read_folder(folder).examples
    read = shards.fetch(read_folder(str(tmp_path / "packed")).pack, "", lambda count: None)
    tables = [
        input_pipeline.decode_all(found_files, "", lambda count: None)
        for found_files in (
            input_pipeline.FileSource(folder, images.paths, 32, print),
            input_pipeline.FileSource("", images.paths, 32, print, read),
        )
    ]
    np.testing.assert_array_equal(tables[0].rows, tables[1].rows)
    np.testing.assert_array_equal(tables[0].is_readable, tables[1].is_readable)


def test_a_shard_that_is_gone_is_told_with_what_mends_it(folder, tmp_path, bucket_url):
    packed = str(tmp_path / "packed")
    make(folder, packed)
    found = read_folder(packed).pack
    upload(tmp_path / "packed", bucket_url)
    shards.open_pack.cache_clear()
    in_bucket = read_folder(bucket_url).pack
    name = shards.shard_name(1)
    os.remove(f"{packed}/{name}")
    files.remove(f"{bucket_url}/{name}")
    for pack_of_it in (found, in_bucket):
        with pytest.raises(UserError, match=rf"{name} .*: run trainer\.pack again, it mends what is missing"):
            shards.fetch(pack_of_it, "", lambda count: None)


def test_shards_that_do_not_fit_on_the_disk_are_told_before_they_are_fetched(folder, tmp_path, bucket_url, monkeypatch):
    make(folder, bucket_url)
    found = read_folder(bucket_url).pack
    usage = type(shutil.disk_usage(tmp_path))(100_000, 90_000, 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free: pass a --cache_dir with more room"):
        shards.fetch(found, str(tmp_path), lambda count: pytest.fail("a shard was fetched"))


@pytest.mark.parametrize("text", ["no JSON", "[1, 2]", '{"format": "another"}'])
def test_a_file_that_only_has_the_manifests_name_makes_no_pack(folder, text):
    with open(f"{folder}/{shards.MANIFEST}", "w") as file:
        file.write(text)
    shards.open_pack.cache_clear()
    assert shards.open_pack(folder) is None
    assert len(read_folder(folder).examples) == 56
