"""Shards are read as the folder that was packed, and missing or damaged shards are reported."""

import os
import shutil

import numpy as np
import pytest

from tests.support.bucket import upload
from tests.support.images import write_images
from trainer.data import input_pipeline, shard_writer, shards
from trainer.data.dataset import read_folder
from trainer.data.input_pipeline import FileSource
from trainer.data.preprocessing import NetworkInput
from trainer.errors import UserError
from trainer.storage import files


@pytest.fixture
def folder(tmp_path):
    return str(write_images(tmp_path / "data", {"cat": 30, "dog": 25}))


def pack(folder: str, output_dir: str) -> None:
    shard_writer.write_shards(
        read_folder(folder), lambda path: shards.read(folder, path), output_dir, shard_bytes=20_000
    )


@pytest.mark.slow
def test_batches_from_shards_are_those_of_the_folder(folder, tmp_path):
    pack(folder, str(tmp_path / "packed"))
    paths = read_folder(folder).examples.paths
    read = shards.fetch(read_folder(str(tmp_path / "packed")).pack, "", lambda count: None)
    from_folder, from_shards = (
        input_pipeline.decode_all(source, "", lambda count: None)
        for source in (
            FileSource(
                directory=folder, paths=paths, network_input=NetworkInput(32, "stretch", "rescale"), on_unreadable=print
            ),
            FileSource(
                directory="",
                paths=paths,
                network_input=NetworkInput(32, "stretch", "rescale"),
                on_unreadable=print,
                read=read,
            ),
        )
    )
    np.testing.assert_array_equal(from_folder.values, from_shards.values)
    np.testing.assert_array_equal(from_folder.is_readable, from_shards.is_readable)


def test_a_missing_shard_is_the_users_error(folder, tmp_path, bucket_url):
    packed = str(tmp_path / "packed")
    pack(folder, packed)
    local = read_folder(packed).pack
    upload(tmp_path / "packed", bucket_url)
    shards.open_pack.cache_clear()
    in_bucket = read_folder(bucket_url).pack
    name = shards.shard_name(1)
    os.remove(files.join(packed, name))
    files.remove(files.join(bucket_url, name))
    for incomplete in (local, in_bucket):
        with pytest.raises(UserError, match=rf"{name} .*: run trainer\.pack again, it writes what is missing"):
            shards.fetch(incomplete, "", lambda count: None)


def test_a_missing_index_is_the_users_error(folder, tmp_path):
    pack(folder, str(tmp_path / "packed"))
    (tmp_path / "packed" / shards.index_name(0)).unlink()
    shards.open_pack.cache_clear()
    with pytest.raises(UserError, match=r"holds \d+ of the 55 images .* run trainer.pack again"):
        read_folder(str(tmp_path / "packed"))


def test_shards_larger_than_the_disk_are_not_fetched(folder, tmp_path, bucket_url, monkeypatch):
    pack(folder, bucket_url)
    packed = read_folder(bucket_url).pack
    usage = type(shutil.disk_usage(tmp_path))(100_000, 90_000, 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free: pass a --cache_dir with more space"):
        shards.fetch(packed, str(tmp_path), lambda count: pytest.fail("a shard was fetched"))


@pytest.mark.parametrize("text", ["no JSON", "[1, 2]", '{"format": "another"}'])
def test_another_file_with_the_manifests_name_is_not_a_pack(folder, text):
    files.atomic_write(files.join(folder, shards.MANIFEST), text)
    shards.open_pack.cache_clear()
    assert shards.open_pack(folder) is None
    assert len(read_folder(folder).examples) == 55
