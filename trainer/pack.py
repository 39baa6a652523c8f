"""Packs many small pictures into a few large TFRecord shards, which a bucket delivers far faster.

    python -m trainer.pack --data_dir=gs://bucket/pictures --output_dir=gs://bucket/packed
    python -m trainer.task --data_dir=gs://bucket/packed --job_dir=gs://bucket/job

Each record is a tf.train.Example: image/encoded, image/filename, image/class/label, image/class/text, image/content_hash.
The shards hold the pictures in an order that is a function of their content alone, so that each shard is a sample of all
classes; the same folder gives the same bytes. Started again, it goes on after the last shard that is whole.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags, logging
from tqdm import tqdm

from trainer import cli
from trainer.data import shards, tfds
from trainer.data.dataset import Folder, read_folder
from trainer.data.shards import ShardRecord
from trainer.errors import UserError
from trainer.storage import files

WRITTEN_TOGETHER = 256  # pictures that are read at once


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string(
        "data_dir", "", "Folder with one sub-folder of pictures per class, local or gs://; or tfds:NAME."
    )
    flags.DEFINE_string("output_dir", "", "Folder for the shards, local or gs://.")
    flags.DEFINE_integer("shard_megabytes", 128, "Size at which a shard is closed.", lower_bound=1)
    flags.DEFINE_float("max_bad_fraction", 0.01, "Share of unreadable files above which it ends with an error.",
                       lower_bound=0, upper_bound=1)  # fmt: skip


def main(arguments: list[str]) -> None:
    """Packs the folder."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --data_dir={arguments[0]} if it is the folder.")
    cli.require("data_dir", "output_dir")
    data_dir, output_dir = flags.FLAGS.data_dir, flags.FLAGS.output_dir.rstrip("/")
    if files.is_remote(output_dir):
        from trainer.storage import gcs

        gcs.check_writable(output_dir, flag="output_dir")
    with tfds.as_folder(data_dir) as directory:
        num_shards = _pack_folder(directory, output_dir)
    logging.info("%d shards: %s", num_shards, output_dir)
    print(f"train on them: python -m trainer.task --data_dir={output_dir} --job_dir=...")


def _pack_folder(data_dir: str, output_dir: str) -> int:
    is_terminal = sys.stderr.isatty()
    folder = read_folder(data_dir, max_bad_fraction=flags.FLAGS.max_bad_fraction, progress=is_terminal)
    cli.import_tensorflow()
    with tqdm(desc="packing", total=len(folder.examples), unit="img", disable=not is_terminal, leave=False) as bar:
        return pack(
            folder,
            lambda path: shards.read(data_dir, path) or b"",
            output_dir,
            shard_bytes=flags.FLAGS.shard_megabytes * 2**20,
            on_images=bar.update,
        )


Read = Callable[[str], bytes | None]  # the contents of a path below the folder, None if it is gone


def pack(
    folder: Folder,
    read: Read,
    output_dir: str,
    *,
    shard_bytes: int,
    on_images: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes the shards, their indexes and last the manifest; returns the number of shards.

    Raises UserError if a picture is not what was listed any more, or if `output_dir` holds shards of other pictures.
    """
    files.make_directory(output_dir)
    hashes, paths = folder.examples.hashes, folder.examples.paths
    order = sorted(range(len(paths)), key=lambda i: (hashes[i], paths[i]))
    identity = hashlib.sha256(repr((folder.class_names, list(zip(hashes, paths, strict=True)), shard_bytes)).encode())
    begun: dict[str, Any] = {"format": shards.FORMAT, "fingerprint": identity.hexdigest(), "shards": []}
    progress_path = files.join(output_dir, "progress.json")
    before = files.read_json(progress_path) or files.read_json(files.join(output_dir, shards.MANIFEST)) or begun
    if before["fingerprint"] != begun["fingerprint"]:
        raise UserError(f"{output_dir} holds shards of other pictures or another size: pass another --output_dir.")
    written: list[dict[str, Any]] = []
    position = 0
    while position < len(order):
        number = len(written)
        known = before["shards"][number] if number < len(before["shards"]) else None
        if known is None or not _is_whole(output_dir, number, known):
            known = _write_shard(folder, read, output_dir, number, order[position:], shard_bytes)
        written.append(known)
        position += known["pictures"]
        on_images(known["pictures"])
        files.write_json(progress_path, {**begun, "shards": written})
    manifest = {
        **{**begun, "pictures": len(order), "class_names": folder.class_names, "kinds": sorted(folder.formats)},
        **{"sides": folder.split_folders, "bad_files": folder.bad_files, "shards": written},
    }
    files.write_json(files.join(output_dir, shards.MANIFEST), manifest)
    files.remove(progress_path)
    shards.open_pack.cache_clear()
    return len(written)


class _Written(NamedTuple):
    """A shard's file on this machine, and where each picture lies in it."""

    path: str
    records: list[ShardRecord]


def _write_shard(folder: Folder, read: Read, output_dir: str, number: int, order: list[int], shard_bytes: int) -> dict:
    """Writes the next pictures of `order` until the shard is full; returns what the manifest says of it."""
    with tempfile.TemporaryDirectory() as directory:
        written = _write_local(folder, read, os.path.join(directory, "shard"), number, order, shard_bytes)
        _check(written)
        contents = files.read_existing(written.path)
    files.atomic_write(files.join(output_dir, shards.shard_name(number)), contents)
    shards.write_index(output_dir, number, written.records)
    return {
        **{"name": shards.shard_name(number), "pictures": len(written.records), "num_bytes": len(contents)},
        **{"md5": hashlib.md5(contents, usedforsecurity=False).hexdigest()},
    }


def _write_local(folder: Folder, read: Read, path: str, number: int, order: list[int], shard_bytes: int) -> _Written:
    import tensorflow as tf

    records, end = [], 0
    with tf.io.TFRecordWriter(path) as writer:
        for start in range(0, len(order), WRITTEN_TOGETHER):
            together = order[start : start + WRITTEN_TOGETHER]
            images = files.parallel(lambda i: read(str(folder.examples.paths[i])), together, workers=32)
            for i, contents in zip(together, images, strict=True):
                name, content_hash = folder.examples.paths[i], folder.examples.hashes[i]
                if contents is None or hashlib.md5(contents, usedforsecurity=False).hexdigest() != content_hash:
                    raise UserError(f"{name!r} changed while it was packed: start again.")
                label = int(folder.examples.labels[i])
                record = _example(contents, name, label, folder.class_names[label], content_hash)
                offset = end + 12 + record.index(contents)  # 8 bytes of length and 4 of their CRC come before a record
                records.append(ShardRecord(i, name, label, content_hash, number, offset, len(contents)))
                writer.write(record)
                end += len(record) + 16
                if end >= shard_bytes:
                    return _Written(path, records)
    return _Written(path, records)


def _example(contents: bytes, name: str, label: int, class_name: str, content_hash: str) -> bytes:
    import tensorflow as tf

    def text(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    feature = {
        "image/encoded": text(contents),
        "image/filename": text(name.encode()),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "image/class/text": text(class_name.encode()),
        "image/content_hash": text(content_hash.encode()),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(deterministic=True)


def _check(written: _Written) -> None:
    """Raises RuntimeError unless TensorFlow reads every record back, CRCs and all, as the picture it was made of."""
    import tensorflow as tf

    found = 0
    for record, serialized in zip(written.records, tf.data.TFRecordDataset(written.path), strict=True):
        contents = tf.train.Example.FromString(serialized.numpy()).features.feature["image/encoded"].bytes_list.value[0]
        found += hashlib.md5(contents, usedforsecurity=False).hexdigest() == record.content_hash
    if found != len(written.records):
        raise RuntimeError(
            f"{len(written.records) - found} records of a shard were not read back as they were written."
        )


def _is_whole(output_dir: str, number: int, known: dict) -> bool:
    """Whether a shard of an earlier start is there with its index, byte for byte."""
    path = files.join(output_dir, shards.shard_name(number))
    index = shards.read_index(output_dir, number)
    return index is not None and len(index) == known["pictures"] and files.content_hash(path) == known["md5"]


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
