"""Reads the files of a data directory once, in parallel: content hash, format, and the reason to reject a file.

No TensorFlow. P is the number of listed paths.
"""

import collections
import functools
import hashlib
import math
import multiprocessing
import os
import shlex
import signal
import stat
from collections.abc import Callable, Collection
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from trainer import cli, config
from trainer.data import formats, listing
from trainer.data.listing import BadFile, Listing
from trainer.errors import UserError
from trainer.storage import files

if TYPE_CHECKING:
    from trainer.storage import gcs

# From this number of local files on, processes check them: the threads of one process compute on one core, but starting
# processes takes half a second.
MANY_FILES = 10_000

_THREADS_PER_PROCESS = 4  # each waits for the disk

_MAX_REASONS = 4  # in the message of check_bad_fraction

HEAD_BYTES = 65_536  # holds the header of nearly every image, and all of a small image


class FileCheck(NamedTuple):
    """The result for one file."""

    content_hash: str  # MD5 as hex; empty if the file could not be read
    reason: str  # why the file cannot be used; empty if it can
    image_format: str = ""  # as in formats.detect_format


def check_files(data_dir: str, listed: Listing, *, progress: bool, read_parallelism: int) -> list[FileCheck]:
    """Checks all listed files; returns a list of length P in the order of `listed.paths`.

    `read_parallelism` is the number of files read in parallel (0: chosen here). Raises OSError if a bucket cannot be
    read.
    """
    paths = listed.paths
    executor, portion_size, check = _plan(data_dir, listed, read_parallelism)
    portions = [paths[start : start + portion_size] for start in range(0, len(paths), portion_size)]
    checks = []
    with executor, tqdm(desc="reading images", total=len(paths), unit="img", disable=not progress, leave=False) as bar:
        for portion in executor.map(check, portions):
            checks += portion
            bar.update(len(portion))
    return checks


def _plan(
    data_dir: str, listed: Listing, read_parallelism: int
) -> tuple[Executor, int, Callable[[list[str]], list[FileCheck]]]:
    """The executor, the number of files in a task, and the function that checks the files of a task."""
    cores = os.cpu_count() or 1
    if files.is_remote(data_dir) or any(files.is_remote(path) for path in listed.paths):
        threads = read_parallelism or config.REMOTE_READ_PARALLELISM
        # A request takes longer than starting a task, so tasks are small.
        return ThreadPoolExecutor(threads), 8, functools.partial(_check_objects, data_dir, listed.objects)
    if len(listed.paths) >= MANY_FILES:
        context = multiprocessing.get_context("spawn")
        processes = min(8, cores)  # 40 MB each
        pool = ProcessPoolExecutor(processes, context, initializer=_ignore_interrupts)
        return pool, 1024, functools.partial(_check_in_parallel, data_dir)
    # Starting a task per file would take longer than reading the file.
    return ThreadPoolExecutor(read_parallelism or min(32, 4 * cores)), 64, functools.partial(_check_portion, data_dir)


def _ignore_interrupts() -> None:
    """Leaves Ctrl-C to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_in_parallel(data_dir: str, paths: list[str]) -> list[FileCheck]:
    size = -(-len(paths) // _THREADS_PER_PROCESS)
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor(_THREADS_PER_PROCESS) as threads:
        return [check for part in threads.map(functools.partial(_check_portion, data_dir), parts) for check in part]


def _check_portion(data_dir: str, paths: list[str]) -> list[FileCheck]:
    return [check_file(listing.join(data_dir, path)) for path in paths]


def _check_objects(data_dir: str, objects: "dict[str, gcs.ObjectInfo]", paths: list[str]) -> list[FileCheck]:
    """As _check_portion where some or all files are in a bucket; a label file may name an object that does not exist."""

    def check(path: str) -> FileCheck:
        url = listing.join(data_dir, path)
        if not files.is_remote(url):
            return check_file(url)
        return check_object(url, objects[path]) if path in objects else FileCheck("", "does not exist")

    return [check(path) for path in paths]


def check_bad_fraction(bad_files: Collection[BadFile], total: int, max_bad_fraction: float, *, data_dir: str) -> None:
    """Raises UserError if more than `max_bad_fraction` of `total` files are bad.

    The message counts them by reason, and has the command that lists them and the value of the flag that accepts them.
    """
    if len(bad_files) <= max_bad_fraction * total:
        return
    first: dict[str, BadFile] = {}
    for file in bad_files:
        first.setdefault(file.reason, file)
    counts = collections.Counter(file.reason for file in bad_files).most_common(_MAX_REASONS)
    reasons = "; ".join(f"{count} x {reason} (the first: {first[reason].path!r})" for reason, count in counts)
    more = f"; and {len(first) - _MAX_REASONS} other reasons" if len(first) > _MAX_REASONS else ""
    accepting = min(1.0, math.ceil(1000 * len(bad_files) / total) / 1000)
    raise UserError(
        f"{len(bad_files)} of {total} files are not readable images, more than --max_bad_fraction={max_bad_fraction} "
        f"allows: {reasons}{more}. `{cli.command('inspect_data')} --data_dir={shlex.quote(data_dir)}` lists them all. Remove "
        f"them, or pass --max_bad_fraction={accepting:g} to leave them out."
    )


def check_file(path: str) -> FileCheck:
    """Reads one local file and checks by its content whether it can be decoded.

    The hash is MD5 because Cloud Storage lists the MD5 of each object, so a bucket need not be read to be split. It is
    not used for security.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would block forever
            return FileCheck("", "neither a file nor a folder")
        with open(path, "rb", buffering=0) as file:
            contents = file.readall()
    except OSError as error:
        return FileCheck("", f"cannot be read: {error.strerror}")
    return check_contents(contents)


def check_contents(contents: bytes) -> FileCheck:
    """As check_file, for the bytes of a file."""
    content_hash = hashlib.md5(contents, usedforsecurity=False).hexdigest()
    return FileCheck(content_hash, formats.rejection_reason(contents), formats.detect_format(contents))


def check_object(url: str, info: "gcs.ObjectInfo") -> FileCheck:
    """As check_file, for an object in a bucket: reads its first and last bytes, or all of it where these do not
    suffice.

    Raises OSError if the object cannot be read.
    """
    from trainer.storage import gcs

    if not info.num_bytes:
        return FileCheck(info.content_hash, formats.rejection_reason(b""))
    if info.num_bytes > HEAD_BYTES and info.content_hash:
        head = gcs.read(url, start=0, end=HEAD_BYTES)
        tail = gcs.read(url, start=info.num_bytes - formats.TAIL_BYTES, end=info.num_bytes)
        if formats.is_complete(head, tail):
            return FileCheck(info.content_hash, "", formats.detect_format(head))
    return check_contents(gcs.read(url))  # a composite object has no MD5 in the listing
