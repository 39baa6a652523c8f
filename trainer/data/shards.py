"""Reads a folder of images that trainer.pack has packed into TFRecord shards. No TensorFlow.

`manifest.json` lists the shards, each with its size and MD5. The .csv file next to each shard has the offset and size
of each image in it, so images are read in any order, and the split is that of the folder.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from trainer.data import listing
from trainer.errors import UserError
from trainer.storage import files

MANIFEST = "manifest.json"
FORMAT = "picture-shards-1"
COLUMNS = ("position", "path", "label", "content_hash", "offset", "num_bytes", "side", "group")


@dataclasses.dataclass(frozen=True, slots=True)
class ShardRecord:
    """The location of an image in the shards."""

    position: int  # index among the examples of the folder that was packed
    path: str
    label: int
    content_hash: str
    shard: int
    offset: int  # bytes, in the file of the shard
    num_bytes: int
    side: str = ""  # as in Folder.sides and Examples.groups; an index of an earlier version has no such columns
    group: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Pack:
    """A folder of shards."""

    directory: str
    manifest: dict[str, Any]
    records: tuple[ShardRecord, ...]  # in the order of the examples of the folder that was packed
    by_path: dict[str, ShardRecord]


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"pictures-{number:05d}.tfrecord"


def index_name(number: int) -> str:
    """The file name of the index of a shard."""
    return f"pictures-{number:05d}.csv"


@functools.lru_cache(8)
def open_pack(directory: str) -> Pack | None:
    """The pack in a folder, local or gs://; None if there is none. Raises UserError if indexes are missing or damaged."""
    if directory.startswith("tfds:"):
        return None
    path = files.join(directory, MANIFEST)
    if not files.is_remote(path) and not os.path.isfile(path):
        return None  # listing the folder reports its errors
    try:
        manifest = files.read_json(path)
    except UserError:  # another file of that name
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    try:
        check_shards(manifest)
        _check_description(manifest)
        indexes = files.parallel(lambda number: read_index(directory, number) or [], range(len(manifest["shards"])))
        records = [record for index in indexes for record in index]
        _check_records(records, manifest)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{directory}: {MANIFEST} or an index is damaged ({reason}): run trainer.pack again, into another folder."
        ) from None
    if len(records) != manifest["pictures"]:
        raise UserError(
            f"{directory} holds {len(records)} of the {manifest['pictures']} images in its {MANIFEST}: run "
            "trainer.pack again, it writes what is missing."
        )
    records.sort(key=lambda record: record.position)
    return Pack(directory, manifest, tuple(records), {record.path: record for record in records})


def check_shards(manifest: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless a manifest, or the progress of trainer.pack, lists shards."""
    kinds: dict[str, type] = {"pictures": int, "num_bytes": int, "md5": str}
    if not isinstance(manifest["fingerprint"], str) or not isinstance(manifest["shards"], list):
        raise ValueError("fingerprint is not a text, or shards is not a list")
    for shard in manifest["shards"]:
        for name, kind in kinds.items():
            if not isinstance(shard[name], kind):
                raise ValueError(f"{name} of a shard is {shard[name]!r}")


def _check_description(manifest: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless the other entries of a manifest are those of trainer.pack."""
    sides, names = manifest["sides"], manifest["class_names"]
    if sides is not None:
        training, validation, left_out, *test = sides  # a pack of an earlier version has no test folder
        names = [*names, training, validation, *left_out, *test]
    texts = [*names, *manifest["kinds"], *(text for bad_file in manifest["bad_files"] for text in bad_file)]
    if not isinstance(manifest["pictures"], int) or not all(isinstance(text, str) for text in texts):
        raise ValueError("an entry has another type than trainer.pack writes")
    if any(len(bad_file) != 2 for bad_file in manifest["bad_files"]):
        raise ValueError("bad_files is not a list of paths and reasons")


def _check_records(records: list[ShardRecord], manifest: dict[str, Any]) -> None:
    """Raises ValueError unless the positions are 0, 1, ... where all records exist, and each record is plausible."""
    num_classes, sizes = len(manifest["class_names"]), [shard["num_bytes"] for shard in manifest["shards"]]
    for record in records:
        fits = 0 <= record.offset <= record.offset + record.num_bytes <= sizes[record.shard]
        if not fits or not 0 <= record.label < num_classes:
            raise ValueError(f"the row of {record.path!r} does not fit its shard or the classes")
    if len(records) == manifest["pictures"] and {record.position for record in records} != set(range(len(records))):
        raise ValueError("the positions of the images are not 0, 1, ...")


def read_index(directory: str, number: int) -> list[ShardRecord] | None:
    """The records of one shard, None if its index does not exist. Raises KeyError, TypeError or ValueError for bad rows."""
    contents = files.read(files.join(directory, index_name(number)))
    if contents is None:
        return None
    return [
        ShardRecord(
            position=int(row["position"]),
            path=row["path"],
            label=int(row["label"]),
            content_hash=row["content_hash"],
            shard=number,
            offset=int(row["offset"]),
            num_bytes=int(row["num_bytes"]),
            side=row.get("side", ""),
            group=row.get("group", ""),
        )
        for row in csv.DictReader(io.StringIO(contents.decode(), newline=""))
    ]


def write_index(directory: str, number: int, records: list[ShardRecord]) -> None:
    """Writes the index of one shard."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([[getattr(record, name) for name in COLUMNS] for record in records])
    files.atomic_write(files.join(directory, index_name(number)), text.getvalue())


def read(data_dir: str, path: str) -> bytes | None:
    """The bytes of one image of a folder, packed or not, local or gs://; None if the image does not exist."""
    pack = open_pack(data_dir)
    if pack is None:
        return files.read(listing.join(data_dir, path))
    record = pack.by_path.get(path)
    if record is None:
        return None
    shard = files.join(data_dir, shard_name(record.shard))
    return files.read_range(shard, record.offset, record.offset + record.num_bytes)


def fetch(pack: Pack, cache_dir: str, on_shard: Callable[[int], None]) -> Callable[[str], bytes]:
    """A function that returns the bytes of a path in the pack. Copies the shards of a bucket to local disk first.

    A few large transfers take less time than many small ones. The function returns b"" for an image whose bytes are not
    those that were packed. `cache_dir` is a local folder, or '' for the system's temporary folder; the copies are
    deleted when the process ends. `on_shard` receives the number of shards that became available.

    Raises:
      UserError: the shards do not fit on the disk, or one of them is missing.
      OSError: a bucket cannot be read.
    """
    paths = [files.join(pack.directory, shard_name(number)) for number in range(len(pack.manifest["shards"]))]
    if files.is_remote(pack.directory):
        maps = _copy_to_disk(pack, paths, cache_dir, on_shard)
    else:
        maps = [_map(path) for path in paths]
        on_shard(len(paths))

    def read_packed(path: str) -> bytes:
        record = pack.by_path[path]
        contents = maps[record.shard][record.offset : record.offset + record.num_bytes]
        is_same = hashlib.md5(contents, usedforsecurity=False).hexdigest() == record.content_hash
        return contents if is_same else b""

    return read_packed


def _copy_to_disk(pack: Pack, urls: list[str], cache_dir: str, on_shard: Callable[[int], None]) -> list[mmap.mmap]:
    directory = cache_dir if cache_dir and not files.is_remote(cache_dir) else tempfile.gettempdir()
    files.make_directory(directory)
    required = sum(shard["num_bytes"] for shard in pack.manifest["shards"])
    free = shutil.disk_usage(directory).free
    if required > 0.9 * free:
        raise UserError(
            f"The shards in {pack.directory} are {required / 2**30:.1f} GiB, {directory} has {free / 2**30:.1f} GiB "
            "free: pass a --cache_dir with more space."
        )

    def copy(url: str) -> mmap.mmap:
        with tempfile.TemporaryFile(dir=directory) as file:
            contents = files.read(url)
            if not contents:
                raise UserError(f"{url} does not exist: run trainer.pack again, it writes what is missing.")
            file.write(contents)
            file.flush()
            on_shard(1)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    return files.parallel(copy, urls, workers=4)  # each holds a shard in memory, 128 MB by default


def _map(path: str) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), os.path.getsize(path), access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UserError(
            f"{path} cannot be read ({error}): run trainer.pack again, it writes what is missing."
        ) from None
