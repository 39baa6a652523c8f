"""Packs a folder of images into TFRecord shards that `shards` reads.

Each record is a tf.train.Example: image/encoded, image/filename, image/class/label, image/class/text,
image/content_hash. The order of the images is a function of their content alone, so each shard is a sample of all
classes, and the same folder gives the same bytes. Functions import TensorFlow when they need it.
Shapes: N examples.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

from trainer.data import shards
from trainer.data.dataset import Folder
from trainer.data.shards import ShardRecord
from trainer.errors import UserError
from trainer.storage import files

READ_BATCH_SIZE = 256  # images read in parallel

_HEADER_BYTES = 12  # before a record in a TFRecord file: 8 of its length, 4 of the length's CRC
_FOOTER_BYTES = 4  # after it: its CRC

Read = Callable[[str], bytes | None]  # the contents of a path in the folder, None if the file does not exist


def write_shards(
    folder: Folder,
    read: Read,
    output_dir: str,
    *,
    shard_bytes: int,
    on_images: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes the shards and their indexes, and then the manifest; returns the number of shards.

    A shard is closed when it has `shard_bytes` or more. An interrupted run resumes after its last complete shard; a
    damaged shard is written again. `on_images` receives the number of images in each shard that is complete.

    Raises:
      UserError: an image is not the one that was listed, or `output_dir` holds shards of other images.
    """
    files.make_directory(output_dir)
    hashes, paths = folder.examples.hashes, folder.examples.paths
    order = sorted(range(len(paths)), key=lambda i: (hashes[i], paths[i]))
    fingerprint = _fingerprint(folder, shard_bytes)
    progress_path = files.join(output_dir, "progress.json")
    existing = _existing_shards(output_dir, progress_path, fingerprint)
    written: list[dict[str, Any]] = []
    position = 0
    while position < len(order):
        number = len(written)
        shard = existing[number] if number < len(existing) else None
        if shard is None or not _is_complete(output_dir, number, shard):
            shard = _write_shard(
                folder, read, output_dir, number=number, order=order[position:], shard_bytes=shard_bytes
            )
        written.append(shard)
        position += shard["pictures"]
        on_images(shard["pictures"])
        files.write_json(progress_path, {"format": shards.FORMAT, "fingerprint": fingerprint, "shards": written})
    manifest = {
        "format": shards.FORMAT,
        "fingerprint": fingerprint,
        "shards": written,
        "pictures": len(order),
        "class_names": folder.class_names,
        "kinds": sorted(folder.formats),
        "sides": folder.split_folders,
        "bad_files": folder.bad_files,
    }
    files.write_json(files.join(output_dir, shards.MANIFEST), manifest)
    files.remove(progress_path)
    shards.open_pack.cache_clear()
    return len(written)


def _fingerprint(folder: Folder, shard_bytes: int) -> str:
    examples = folder.examples
    described: list[Any] = [folder.class_names, list(zip(examples.hashes, examples.paths, strict=True)), shard_bytes]
    if folder.labels_file:  # else the paths say the rest
        columns = (examples.labels, examples.groups, folder.sides)
        described += [None if column is None else column.tolist() for column in columns]
    return hashlib.sha256(repr(tuple(described)).encode()).hexdigest()


def _existing_shards(output_dir: str, progress_path: str, fingerprint: str) -> list[dict[str, Any]]:
    """The shards in the manifest of an earlier run, finished or not."""
    manifest_path = files.join(output_dir, shards.MANIFEST)
    earlier = files.read_json_object(progress_path) or files.read_json_object(manifest_path)
    if not earlier:
        return []
    try:
        shards.check_shards(earlier)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{progress_path} or {manifest_path} is damaged ({error}): delete both, or pass another --output_dir."
        ) from None
    if earlier["fingerprint"] != fingerprint:
        raise UserError(
            f"{output_dir} holds shards of other images or with another shard size: pass another --output_dir."
        )
    return earlier["shards"]


def _is_complete(output_dir: str, number: int, shard: dict[str, Any]) -> bool:
    """Whether a shard in the manifest exists with its index, byte for byte."""
    path = files.join(output_dir, shards.shard_name(number))
    try:
        index = shards.read_index(output_dir, number)
    except (KeyError, TypeError, ValueError):  # a damaged index is written again, with its shard
        return False
    return index is not None and len(index) == shard["pictures"] and files.content_hash(path) == shard["md5"]


def _write_shard(
    folder: Folder, read: Read, output_dir: str, *, number: int, order: list[int], shard_bytes: int
) -> dict[str, Any]:
    """Writes the next images of `order` until the shard is full; returns its entry in the manifest."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "shard")
        records = _write_records(folder, read, path, number=number, order=order, shard_bytes=shard_bytes)
        _verify(path, records)
        contents = files.read_existing(path)
    files.atomic_write(files.join(output_dir, shards.shard_name(number)), contents)
    shards.write_index(output_dir, number, records)
    return {
        "name": shards.shard_name(number),
        "pictures": len(records),
        "num_bytes": len(contents),
        "md5": hashlib.md5(contents, usedforsecurity=False).hexdigest(),
    }


def _write_records(
    folder: Folder, read: Read, path: str, *, number: int, order: list[int], shard_bytes: int
) -> list[ShardRecord]:
    """Writes a shard to a local path; returns the location of each image in it."""
    import tensorflow as tf

    examples = folder.examples
    records: list[ShardRecord] = []
    end = 0
    with tf.io.TFRecordWriter(path) as writer:
        for start in range(0, len(order), READ_BATCH_SIZE):
            positions = order[start : start + READ_BATCH_SIZE]
            images = files.parallel(lambda i: read(str(examples.paths[i])), positions, workers=32)
            for i, contents in zip(positions, images, strict=True):
                name, content_hash, label = examples.paths[i], examples.hashes[i], int(examples.labels[i])
                if contents is None or hashlib.md5(contents, usedforsecurity=False).hexdigest() != content_hash:
                    raise UserError(f"{name!r} changed while it was packed: run trainer.pack again.")
                serialized = _example(
                    contents, name=name, label=label, class_name=folder.class_names[label], content_hash=content_hash
                )
                record = ShardRecord(
                    position=i,
                    path=name,
                    label=label,
                    content_hash=content_hash,
                    shard=number,
                    offset=end + _HEADER_BYTES + serialized.index(contents),
                    num_bytes=len(contents),
                    side="" if folder.sides is None else str(folder.sides[i]),
                    group="" if examples.groups is None else str(examples.groups[i]),
                )
                records.append(record)
                writer.write(serialized)
                end += _HEADER_BYTES + len(serialized) + _FOOTER_BYTES
                if end >= shard_bytes:
                    return records
    return records


def _example(contents: bytes, *, name: str, label: int, class_name: str, content_hash: str) -> bytes:
    import tensorflow as tf

    def bytes_feature(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    feature = {
        "image/encoded": bytes_feature(contents),
        "image/filename": bytes_feature(name.encode()),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "image/class/text": bytes_feature(class_name.encode()),
        "image/content_hash": bytes_feature(content_hash.encode()),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)


def _verify(path: str, records: list[ShardRecord]) -> None:
    """Raises RuntimeError unless TensorFlow, which checks the CRCs, reads back every image unchanged."""
    import tensorflow as tf

    num_equal = 0
    for record, serialized in zip(records, tf.data.TFRecordDataset(path), strict=True):
        contents = tf.train.Example.FromString(serialized.numpy()).features.feature["image/encoded"].bytes_list.value[0]
        num_equal += hashlib.md5(contents, usedforsecurity=False).hexdigest() == record.content_hash
    if num_equal != len(records):
        raise RuntimeError(
            f"{len(records) - num_equal} of {len(records)} records of a shard differ from what was written."
        )
