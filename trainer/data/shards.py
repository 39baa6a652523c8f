"""A folder of pictures packed into TFRecord shards: what trainer.pack leaves, found again and read. No TensorFlow.

`manifest.json` names the shards, each with its size and CRC-32C; beside each shard a .csv tells where the bytes of each
picture lie in it, so that pictures are read in any order and the split is that of the folder.
Shapes: N pictures, K shards.
"""

import csv
import functools
import hashlib
import io
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from trainer.errors import UserError
from trainer.storage import files

MANIFEST, FORMAT = "manifest.json", "picture-shards-1"


COLUMNS = ("position", "path", "label", "content_hash", "offset", "num_bytes")


class ShardRecord(NamedTuple):
    """Where a picture lies: its place among the folder's pictures; `offset` and `num_bytes` within the shard's file."""

    position: int
    path: str
    label: int
    content_hash: str
    shard: int
    offset: int
    num_bytes: int


class Pack(NamedTuple):
    """A folder of shards; records in the order that the pictures had in the folder they came from."""

    directory: str
    manifest: dict
    records: tuple[ShardRecord, ...]
    by_path: dict[str, ShardRecord]


def shard_name(number: int) -> str:
    """The file of a shard; its index has the same name and ends in .csv."""
    return f"pictures-{number:05d}.tfrecord"


@functools.lru_cache(8)
def open_pack(directory: str) -> Pack | None:
    """The pack in a folder, local or gs://; None if there is none. Raises UserError if parts of it are missing."""
    if directory.startswith("tfds:"):
        return None
    path = files.join(directory, MANIFEST)
    if not files.is_remote(path) and not os.path.isfile(path):
        return None  # what is wrong with the folder is told by who lists it
    try:
        manifest = files.read_json(path)
    except ValueError:  # somebody else's file of that name
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None

    def read(number: int) -> list[ShardRecord]:
        return read_index(directory, number) or []

    records = [record for part in files.parallel(read, range(len(manifest["shards"]))) for record in part]
    if len(records) != manifest["pictures"]:
        raise UserError(
            f"{directory} holds {len(records)} of {manifest['pictures']} pictures that its {MANIFEST} tells of: run "
            "trainer.pack again, it mends what is missing."
        )
    records.sort()
    return Pack(directory, manifest, tuple(records), {record.path: record for record in records})


def read_index(directory: str, number: int) -> list[ShardRecord] | None:
    """The records of one shard, None if its index is not there."""
    contents = files.read(files.join(directory, shard_name(number).replace(".tfrecord", ".csv")))
    if contents is None:
        return None
    rows = csv.DictReader(io.StringIO(contents.decode(), newline=""))
    whole = ("position", "label", "offset", "num_bytes")
    records: list[dict[str, Any]] = [{**row, **{name: int(row[name]) for name in whole}} for row in rows]
    return [ShardRecord(**record, shard=number) for record in records]


def write_index(directory: str, number: int, records: list[ShardRecord]) -> None:
    """Writes the index of one shard."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([[getattr(record, name) for name in COLUMNS] for record in records])
    files.atomic_write(files.join(directory, shard_name(number).replace(".tfrecord", ".csv")), text.getvalue())


def read(data_dir: str, path: str) -> bytes | None:
    """The bytes of one picture of a folder, packed or not, local or gs://; None if it is gone."""
    pack = open_pack(data_dir)
    if pack is None:
        return files.read(files.join(data_dir, path))
    record = pack.by_path.get(path)
    if record is None:
        return None
    shard = files.join(data_dir, shard_name(record.shard))
    return files.read_range(shard, record.offset, record.offset + record.num_bytes)


def fetch(pack: Pack, cache_dir: str, on_shard: Callable[[int], None]) -> Callable[[str], bytes]:
    """A function path -> bytes over all shards, from a bucket copied to local disk first: a few large transfers.

    Bytes that are not those that were packed come as b"". `cache_dir` is a local folder, or '' for the system's temporary
    one; the copies vanish with the process. Raises UserError if they do not fit.
    """
    names = [files.join(pack.directory, shard_name(number)) for number in range(len(pack.manifest["shards"]))]
    if files.is_remote(pack.directory):
        directory = cache_dir if cache_dir and not files.is_remote(cache_dir) else tempfile.gettempdir()
        files.make_directory(directory)
        needed, free = sum(shard["num_bytes"] for shard in pack.manifest["shards"]), shutil.disk_usage(directory).free
        if needed > 0.9 * free:
            raise UserError(
                f"The shards in {pack.directory} are {needed / 2**30:.1f} GiB, {directory} has {free / 2**30:.1f} GiB "
                "free: pass a --cache_dir with more room."
            )

        def copy(name: str) -> mmap.mmap:
            with tempfile.TemporaryFile(dir=directory) as file:
                contents = files.read(name)
                if not contents:
                    raise UserError(f"{name} is not there any more: run trainer.pack again, it mends what is missing.")
                file.write(contents)
                file.flush()
                on_shard(1)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        maps = files.parallel(copy, names, workers=4)  # of 128 MB each in memory meanwhile
    else:
        maps = [_map(name) for name in names]
        on_shard(len(names))

    def read_packed(path: str) -> bytes:
        record = pack.by_path[path]
        contents = maps[record.shard][record.offset : record.offset + record.num_bytes]
        is_same = hashlib.md5(contents, usedforsecurity=False).hexdigest() == record.content_hash
        return contents if is_same else b""

    return read_packed


def _map(name: str) -> mmap.mmap:
    try:
        with open(name, "rb") as file:
            return mmap.mmap(file.fileno(), os.path.getsize(name), access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: shorter than it should be
        raise UserError(f"{name} cannot be read ({error}): run trainer.pack again, it mends what is missing.") from None


def labels_of(pack: Pack) -> np.ndarray:
    """int32 [N]."""
    return np.array([record.label for record in pack.records], np.int32)
