"""A folder of pictures, one sub-folder per class -> Examples, split into training and validation.

No TensorFlow: the folder is read, and its mistakes are told, before TensorFlow's four seconds of import.
Shapes: N examples, C classes.
"""

import csv
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import signal
import stat
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from trainer import formats, listing, shards, storage
from trainer.errors import UserError
from trainer.listing import BadFile, Sides, printable

if TYPE_CHECKING:
    from trainer import bucket
REMOTE_PARALLELISM = 48  # requests at once: at 50 ms each, a thousand objects a second


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N pictures: path relative to the data directory, class index, MD5 of the content as hex."""

    paths: np.ndarray  # str objects [N]
    labels: np.ndarray  # int32 [N]
    hashes: np.ndarray  # str objects [N]

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at those positions (or where a boolean mask is true), in that order."""
        return Examples(self.paths[indices], self.labels[indices], self.hashes[indices])

    def __len__(self) -> int:
        return len(self.paths)


class Folder(NamedTuple):
    """What was found in a data directory: classes in sorted order, good examples in sorted order, bad files."""

    class_names: tuple[str, ...]
    examples: Examples
    bad_files: tuple[BadFile, ...]
    kinds: frozenset[str] = frozenset()  # formats of the good examples, as formats.kind names them
    pack: shards.Pack | None = None  # where the pictures lie in shards
    sides: Sides | None = None  # where the folder says itself what is held out


class Split(NamedTuple):
    """The two sides of the split; no content is on both sides within a class."""

    training: Examples
    validation: Examples


def read_folder(
    data_dir: str, *, max_bad_fraction: float = 1.0, progress: bool = False, read_parallelism: int = 0
) -> Folder:
    """Looks at every file below `data_dir`/CLASS/ once, in parallel: its hash, and whether it looks like a picture.

    A bucket lists the hashes, so of an object only the ends are read, `read_parallelism` at once (0: as many as suit).

    Where `data_dir` holds a folder train and a folder val (or training, valid, validation), the classes lie below these.
    Raises UserError where there is nothing to train on: no such folder, no sub-folders, one class, a class without a
    readable picture, or a share of bad files above `max_bad_fraction`.
    """
    if pack := shards.find(data_dir):
        return _from_pack(pack)
    found = listing.list_files(data_dir)
    paths, class_names = found.paths, found.class_names
    checks = _check_files(data_dir, found, progress=progress, read_parallelism=read_parallelism)
    bad_files = [
        BadFile(printable(path), check.reason) for path, check in zip(paths, checks, strict=True) if check.reason
    ]
    bad_files += found.bad_folders
    examples = Examples(
        np.array(paths, object),
        np.array(found.labels, np.int32),
        np.array([check.content_hash for check in checks], object),
    ).take(np.array([not check.reason for check in checks], bool))
    _check_classes(data_dir, class_names, examples, bad_files)
    check_bad_fraction(len(bad_files), len(paths) + len(found.bad_folders), bad_files[:1], max_bad_fraction)
    kinds = frozenset(check.kind for check in checks if not check.reason)
    return Folder(class_names, examples, tuple(bad_files), kinds, sides=found.sides)


def _from_pack(pack: shards.Pack) -> Folder:
    """What read_folder found when the pack was made."""
    examples = Examples(
        np.array([record.path for record in pack.records], object),
        shards.labels_of(pack),
        np.array([record.content_hash for record in pack.records], object),
    )
    manifest = pack.manifest
    sides = None
    if manifest["sides"]:
        training, validation, left_out = manifest["sides"]
        sides = Sides(training, validation, tuple(left_out))
    bad_files = tuple(BadFile(*bad) for bad in manifest["bad_files"])
    return Folder(tuple(manifest["class_names"]), examples, bad_files, frozenset(manifest["kinds"]), pack, sides)


# From so many local files on, processes check them: one process computes on one core however many threads it has, and
# starting others takes half a second.
MANY_FILES = 10_000
_THREADS_OF_A_PROCESS = 4  # that wait for a slow disk, each for a file


def _check_files(data_dir: str, found: listing.Listing, *, progress: bool, read_parallelism: int) -> list["FileCheck"]:
    is_remote, paths, cores = storage.is_remote(data_dir), found.paths, os.cpu_count() or 1
    pool: Executor
    if not is_remote and len(paths) >= MANY_FILES:
        processes, spawn = min(8, cores), multiprocessing.get_context("spawn")  # 40 MB each
        pool = ProcessPoolExecutor(processes, spawn, initializer=_leave_signals_to_the_parent)
        size, check = 1024, functools.partial(_check_side_by_side, data_dir)
    elif is_remote:
        pool = ThreadPoolExecutor(read_parallelism or REMOTE_PARALLELISM)
        size, check = 8, functools.partial(_check_objects, data_dir, found.objects)  # slower than starting a task
    else:
        pool = ThreadPoolExecutor(read_parallelism or min(32, 4 * cores))
        size, check = 64, functools.partial(_check_portion, data_dir)  # a task per file would cost more than reading it
    portions = [paths[start : start + size] for start in range(0, len(paths), size)]
    checks = []
    with pool, tqdm(desc="reading pictures", total=len(paths), unit="img", disable=not progress, leave=False) as bar:
        for portion in pool.map(check, portions):
            checks += portion
            bar.update(len(portion))
    return checks


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_side_by_side(data_dir: str, paths: list[str]) -> list["FileCheck"]:
    size = -(-len(paths) // _THREADS_OF_A_PROCESS)
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor(_THREADS_OF_A_PROCESS) as threads:
        return [check for part in threads.map(functools.partial(_check_portion, data_dir), parts) for check in part]


def _check_portion(data_dir: str, paths: list[str]) -> list["FileCheck"]:
    return [check_file(storage.join(data_dir, path)) for path in paths]


def _check_objects(data_dir: str, objects: dict, paths: list[str]) -> list["FileCheck"]:
    return [check_object(storage.join(data_dir, path), objects[path]) for path in paths]


def check_bad_fraction(bad: int, total: int, first: Iterable[BadFile], max_bad_fraction: float) -> None:
    """Raises UserError if more than `max_bad_fraction` of `total` files are bad."""
    if bad > max_bad_fraction * total:
        named = "".join(f" The first is {file.path!r}: {file.reason}." for file in first)
        raise UserError(
            f"{bad} of {total} files are no readable pictures, more than --max_bad_fraction={max_bad_fraction} "
            f"allows.{named} Remove them or raise the flag."
        )


class FileCheck(NamedTuple):
    """MD5 as hex of a file's bytes, why it cannot be used (empty: it can), and its format."""

    content_hash: str
    reason: str
    kind: str = ""


def check_file(path: str) -> FileCheck:
    """Reads one file and says by its content whether it can be decoded.

    The hash is MD5 because Cloud Storage lists the same one for each object, so that a bucket need not be read to be
    split; it guards against nothing.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return FileCheck("", "its name is not UTF-8: rename it")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            return FileCheck("", "neither a file nor a folder")
        with open(path, "rb", buffering=0) as file:
            contents = file.readall()
    except OSError as error:
        return FileCheck("", f"cannot be read: {error.strerror}")
    return check_contents(contents)


def check_contents(contents: bytes) -> FileCheck:
    """As check_file, of a file's bytes."""
    content_hash = hashlib.md5(contents, usedforsecurity=False).hexdigest()
    return FileCheck(content_hash, formats.reason_against(contents), formats.kind(contents))


HEAD_BYTES = 65_536  # holds the header of nearly every picture, and small pictures whole


def check_object(url: str, known: "bucket.Object") -> FileCheck:
    """As check_file, of an object of a bucket: by its two ends where they tell enough, else by all of it.

    Raises OSError where the bucket does not let it be read.
    """
    from trainer import bucket

    if not known.num_bytes:
        return FileCheck(known.content_hash, formats.reason_against(b""))
    if known.num_bytes > HEAD_BYTES and known.content_hash:
        head = bucket.read(url, start=0, end=HEAD_BYTES)
        tail = bucket.read(url, start=known.num_bytes - formats.TAIL_BYTES, end=known.num_bytes)
        if formats.is_whole(head, tail):
            return FileCheck(known.content_hash, "", formats.kind(head))
    return check_contents(bucket.read(url))  # an object of several parts lists no hash


def split(examples: Examples, validation_split: float) -> Split:
    """Holds out `validation_split` of each class by content: exact but for rounding and for groups of equal bytes.

    Within a class, files of equal bytes form a group; groups are ranked by their hash, and from the lowest on they are
    held out until the share is reached. So neither machine, path nor order of listing matters, and a file more or less
    moves at most one other group across the border. A class of two pictures or more gives at least one to validation,
    and its last group always stays in training; a class of one picture is trained on and not validated.
    """
    held_out = np.zeros(len(examples), bool)
    for label in np.unique(examples.labels):
        members = np.flatnonzero(examples.labels == label)
        members = members[np.argsort(examples.hashes[members], kind="stable")]
        hashes = examples.hashes[members]
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))  # where each group begins
        target = max(1, round(len(members) * validation_split))
        chosen = starts[:-1] < target
        end = np.append(starts, len(members))[np.count_nonzero(chosen)]
        held_out[members[:end]] = True
    if not held_out.any():
        raise UserError("No class has two different pictures, so none can be held out for validation: add pictures.")
    return Split(examples.take(~held_out), examples.take(held_out))


def fingerprint(sides: Split, class_names: tuple[str, ...]) -> str:
    """A hash of classes, contents and split, the same wherever the folder lies: two runs with it see the same data."""
    digest = hashlib.sha256(repr(class_names).encode())
    for side in sides:
        for label, content_hash in zip(side.labels.tolist(), side.hashes, strict=True):
            digest.update(f"{label} {content_hash}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()


SPLIT_COLUMNS = ("path", "label", "split", "content_hash")


def write_split(file: TextIO, sides: Split, class_names: tuple[str, ...]) -> None:
    """Writes split.csv: path, label, split (training or validation), content_hash."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(SPLIT_COLUMNS)
    for name, side in zip(Split._fields, sides, strict=True):
        for path, label, content_hash in zip(side.paths, side.labels, side.hashes, strict=True):
            writer.writerow((path, class_names[label], name, content_hash))


def _check_classes(data_dir: str, class_names: tuple[str, ...], examples: Examples, bad_files: list[BadFile]) -> None:
    counts = np.bincount(examples.labels, minlength=len(class_names))
    if not counts.any():
        reasons = f" The first is {bad_files[0].path!r}: {bad_files[0].reason}." if bad_files else ""
        raise UserError(f"--data_dir={data_dir} holds no readable picture in {len(class_names)} sub-folders.{reasons}")
    if not counts.all():
        empty = class_names[int(np.argmin(counts))]
        reasons = "".join(f" {b.path!r}: {b.reason}." for b in bad_files if b.path.startswith(empty + "/"))[:300]
        raise UserError(f"Class {empty!r} in {data_dir} holds no readable picture: add some or remove it.{reasons}")
