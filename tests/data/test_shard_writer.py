"""Shards have the images, the split and the order of the folder; packing is deterministic, resumable and verified."""

import os

import pytest

from tests.data.test_dataset_in_bucket import assert_same_folder
from tests.support.bucket import upload
from tests.support.images import write_images
from trainer.data import shard_writer, shards, splits
from trainer.data.dataset import read_folder
from trainer.errors import UserError
from trainer.storage import files


@pytest.fixture
def folder(tmp_path):
    directory = write_images(tmp_path / "data", {"cat": 30, "dog": 25})
    (directory / "dog" / "empty.jpg").write_bytes(b"")
    (directory / "dog" / "again.jpg").write_bytes((directory / "dog" / "dog_000.jpg").read_bytes())
    return str(directory)


def write(folder: str, output_dir: str, read=None) -> int:
    read = read or (lambda path: shards.read(folder, path))
    return shard_writer.write_shards(read_folder(folder), read, output_dir, shard_bytes=20_000)


def contents_of(directory) -> dict[str, bytes]:
    return {name: files.read(files.join(str(directory), name)) for name in files.list_names(str(directory))}


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_shards_equal_the_folder_that_was_packed(folder, tmp_path, bucket_url, where):
    source = upload(tmp_path / "data", f"{bucket_url}/data") if where == "bucket" else folder
    output_dir = f"{bucket_url}/packed" if where == "bucket" else str(tmp_path / "packed")
    assert write(source, output_dir) > 3
    packed, original = read_folder(output_dir), read_folder(folder)
    assert_same_folder(packed, original)
    fingerprints = {
        splits.fingerprint(splits.split_by_content(one.examples, 0.2), one.class_names) for one in (packed, original)
    }
    assert len(fingerprints) == 1
    read = shards.fetch(packed.pack, "", lambda count: None)
    for path in original.examples.paths:
        expected = files.read(files.join(folder, path))
        assert read(path) == expected
        assert shards.read(output_dir, path) == expected


def test_shards_keep_the_folders_of_the_split(tmp_path):
    for seed, side in enumerate(("train", "val", "test")):
        write_images(tmp_path / "data" / side, {"cat": 4, "dog": 3}, seed=seed)
    write(str(tmp_path / "data"), str(tmp_path / "packed"))
    packed, original = (
        splits.choose(read_folder(str(tmp_path / name)), validation_split=0.2, split_file="")
        for name in ("packed", "data")
    )
    assert [side.paths.tolist() for side in packed] == [side.paths.tolist() for side in original]
    assert len(packed.test) == 7
    manifest = files.read_json(str(tmp_path / "packed" / shards.MANIFEST))
    manifest["sides"] = ["train", "val", ["test"]]  # of an earlier version
    files.write_json(str(tmp_path / "packed" / shards.MANIFEST), manifest)
    shards.open_pack.cache_clear()
    assert read_folder(str(tmp_path / "packed")).split_folders == ("train", "val", ("test",), "")


@pytest.mark.parametrize("contents", [None, b"another image"])
def test_an_image_that_changed_while_it_was_packed_is_an_error(folder, tmp_path, contents):
    with pytest.raises(UserError, match=r"'(cat|dog)/.*' changed while it was packed: run trainer.pack again"):
        write(folder, str(tmp_path / "packed"), read=lambda path: contents)
    assert not list((tmp_path / "packed").glob("*.tfrecord"))


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    for name in ("one", "two"):
        write(folder, str(tmp_path / name))
    assert contents_of(tmp_path / "one") == contents_of(tmp_path / "two")


def test_any_reader_of_tfrecord_files_reads_the_shards(folder, tmp_path):
    import tensorflow as tf

    write(folder, str(tmp_path))
    labels = {}
    for serialized in tf.data.TFRecordDataset(sorted(str(path) for path in tmp_path.glob("*.tfrecord"))):
        feature = tf.train.Example.FromString(serialized.numpy()).features.feature
        name = feature["image/filename"].bytes_list.value[0].decode()
        labels[name] = feature["image/class/text"].bytes_list.value[0].decode()
    assert len(labels) == 56
    assert all(name.startswith(label + "/") for name, label in labels.items())


def test_an_interrupted_run_resumes_after_its_last_complete_shard(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "READ_BATCH_SIZE", 4)
    complete, interrupted = tmp_path / "complete", tmp_path / "interrupted"
    write(folder, str(complete))
    requests = []

    def read(path):
        requests.append(path)
        if len(requests) == 30:
            raise ZeroDivisionError
        return shards.read(folder, path)

    with pytest.raises(ZeroDivisionError):
        write(folder, str(interrupted), read)
    assert shards.open_pack(str(interrupted)) is None
    times = {path.name: path.stat().st_mtime_ns for path in interrupted.glob("*.tfrecord")}
    assert 0 < len(times) < len(list(complete.glob("*.tfrecord")))
    write(folder, str(interrupted), read)
    assert {name: os.stat(interrupted / name).st_mtime_ns for name in times} == times
    assert contents_of(interrupted) == contents_of(complete)


def test_a_damaged_shard_is_detected_and_written_again(folder, tmp_path):
    packed = tmp_path / "packed"
    write(folder, str(packed))
    before = contents_of(packed)
    pack = read_folder(str(packed)).pack
    damaged = pack.records[0]
    path = packed / shards.shard_name(damaged.shard)
    contents = bytearray(path.read_bytes())
    contents[damaged.offset + 40] ^= 1
    path.write_bytes(contents)
    read = shards.fetch(pack, "", lambda count: None)
    assert [record.path for record in pack.records if not read(record.path)] == [damaged.path]
    write(folder, str(packed))
    assert contents_of(packed) == before


def test_a_pack_of_other_images_is_not_changed(folder, tmp_path):
    write(folder, str(tmp_path / "packed"))
    before = contents_of(tmp_path / "packed")
    os.remove(files.join(folder, "cat/cat_001.jpg"))
    with pytest.raises(UserError, match="holds shards of other images"):
        write(folder, str(tmp_path / "packed"))
    assert contents_of(tmp_path / "packed") == before
