"""TODO."""

import functools
import hashlib
import multiprocessing
import os
import signal
import stat
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from trainer import config
from trainer.data import formats, listing
from trainer.data.listing import BadFile
from trainer.errors import UserError
from trainer.storage import files

if TYPE_CHECKING:
    from trainer.storage import gcs

# From so many local files on, processes check them: one process computes on one core however many threads it has, and
# starting others takes half a second.
MANY_FILES = 10_000


_THREADS_OF_A_PROCESS = 4  # that wait for a slow disk, each for a file


def check_files(data_dir: str, found: listing.Listing, *, progress: bool, read_parallelism: int) -> list["FileCheck"]:
    is_remote, paths, cores = files.is_remote(data_dir), found.paths, os.cpu_count() or 1
    pool: Executor
    if not is_remote and len(paths) >= MANY_FILES:
        processes, spawn = min(8, cores), multiprocessing.get_context("spawn")  # 40 MB each
        pool = ProcessPoolExecutor(processes, spawn, initializer=_ignore_signals)
        size, check = 1024, functools.partial(_check_in_parallel, data_dir)
    elif is_remote:
        pool = ThreadPoolExecutor(read_parallelism or config.REMOTE_READ_PARALLELISM)
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


def _ignore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_in_parallel(data_dir: str, paths: list[str]) -> list["FileCheck"]:
    size = -(-len(paths) // _THREADS_OF_A_PROCESS)
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor(_THREADS_OF_A_PROCESS) as threads:
        return [check for part in threads.map(functools.partial(_check_portion, data_dir), parts) for check in part]


def _check_portion(data_dir: str, paths: list[str]) -> list["FileCheck"]:
    return [check_file(files.join(data_dir, path)) for path in paths]


def _check_objects(data_dir: str, objects: dict, paths: list[str]) -> list["FileCheck"]:
    return [check_object(files.join(data_dir, path), objects[path]) for path in paths]


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
    return FileCheck(content_hash, formats.rejection_reason(contents), formats.detect_format(contents))


HEAD_BYTES = 65_536  # holds the header of nearly every picture, and small pictures whole


def check_object(url: str, known: "gcs.ObjectInfo") -> FileCheck:
    """As check_file, of an object of a bucket: by its two ends where they tell enough, else by all of it.

    Raises OSError where the bucket does not let it be read.
    """
    from trainer.storage import gcs

    if not known.num_bytes:
        return FileCheck(known.content_hash, formats.rejection_reason(b""))
    if known.num_bytes > HEAD_BYTES and known.content_hash:
        head = gcs.read(url, start=0, end=HEAD_BYTES)
        tail = gcs.read(url, start=known.num_bytes - formats.TAIL_BYTES, end=known.num_bytes)
        if formats.is_complete(head, tail):
            return FileCheck(known.content_hash, "", formats.detect_format(head))
    return check_contents(gcs.read(url))  # an object of several parts lists no hash
