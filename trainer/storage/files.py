"""Files that are whole or absent, on a local disk and in a bucket alike. No TensorFlow.

Local paths go through the operating system, gs:// through trainer.bucket, which is imported only then: a job without a
bucket waits for no library of one. All functions raise OSError.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

# What reading a damaged .npz file raises: its zip frame, the CRC-32 or the header of an array, the end too early.
CORRUPT_ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError)


def _gcs() -> ModuleType:
    from trainer.storage import gcs

    return gcs


def is_remote(path: str) -> bool:
    """Whether the path is an address such as gs://bucket/name."""
    return "://" in path


def retry_count() -> int:
    """How many requests to a bucket had to be made again so far."""
    module = sys.modules.get("trainer.storage.gcs")
    return module.retry_count() if module else 0


def join(directory: str, name: str) -> str:
    """The path of a name in a folder."""
    return f"{directory.rstrip('/')}/{name}" if is_remote(directory) else os.path.join(directory, name)


def read(path: str) -> bytes | None:
    """The bytes of a file, or None if there is no such file. Raises OSError for the rest."""
    try:
        if is_remote(path):
            return _gcs().read(path)
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):  # the latter where a file stands in the place of the folder
        return None


def read_existing(path: str) -> bytes:
    """The bytes of a file that is there. Raises OSError, FileNotFoundError if it is not."""
    contents = read(path)
    if contents is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return contents


def content_hash(path: str) -> str | None:
    """The MD5 of a file as hex, which a bucket knows without its being read; None if there is no such file."""
    if is_remote(path) and (known := _gcs().stat(path)) and known.content_hash:
        return known.content_hash
    contents = read(path)
    return None if contents is None else hashlib.md5(contents, usedforsecurity=False).hexdigest()


def read_range(path: str, start: int, end: int) -> bytes | None:
    """The bytes of a file from `start` up to and without `end`, or None if there is no such file."""
    try:
        if is_remote(path):
            return _gcs().read(path, start=start, end=end)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    except FileNotFoundError:
        return None


def parallel(function: Callable, values: Iterable, *, workers: int = 16) -> list:
    """[function(value) for each], so many at once."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, values))


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path with what lies at `path`, a file or a folder: itself, or a copy for the block."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, os.path.basename(path.rstrip("/")))
        contents = read(path)
        if contents is None:
            _gcs().download_tree(path, copy)
        else:
            with open(copy, "wb") as file:
                file.write(contents)
        yield copy


def read_json(path: str) -> Any:
    """The value in a JSON file, or None if there is no such file."""
    contents = read(path)
    return None if contents is None else json.loads(contents)


def atomic_write(path: str, contents: bytes | memoryview | str) -> None:
    """Writes `contents` (str as UTF-8) under another name, then gives it its own: a reader never sees half of it.

    Raises OSError, and then leaves what stood there before.
    """
    contents = contents.encode() if isinstance(contents, str) else contents
    if is_remote(path):
        _gcs().write(path, contents)  # an object appears when all of it is there
        return
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(contents)


def write_json(path: str, value: object) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """A local name to write a file to; it becomes `path` when the block ends well, and vanishes when it does not."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            temporary = os.path.join(directory, os.path.basename(path))
            yield temporary
            with open(temporary, "rb") as file:
                _gcs().write(path, file.read())
        return
    temporary = _temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or the new name may survive a power cut and the bytes may not
        rename(temporary, path)
    finally:
        if exists(temporary):
            remove(temporary)


def preallocate(path: str, size: int) -> None:
    """Takes `size` bytes for a local file that a library will write, or raises OSError, where the system can (Linux).

    HDF5 does not raise where the disk is full: it ends the process, so that it must not come to that.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # these say that the filesystem cannot
                    raise


@contextlib.contextmanager
def atomic_directory(directory: str) -> Iterator[str]:
    """As `whole`, for a folder; it takes the place of the one that may stand there."""
    if is_remote(directory):
        with tempfile.TemporaryDirectory() as parent:
            temporary = os.path.join(parent, os.path.basename(directory.rstrip("/")))
            yield temporary
            _gcs().upload_tree(temporary, directory)
        return
    temporary = _temporary_name(directory)
    try:
        yield temporary
        if exists(directory):
            before = _temporary_name(directory + ".before")
            rename(directory, before)
            rename(temporary, directory)
            shutil.rmtree(before)
        else:
            make_directory(os.path.dirname(directory))
            rename(temporary, directory)
    finally:
        if exists(temporary):
            shutil.rmtree(temporary)


def upload_changed_files(directory: str, path: str, sizes: dict[str, int]) -> None:
    """Copies the files below a local folder that have grown since `sizes`, which is brought up to date, to gs://."""
    for root, _, names in os.walk(directory):
        for name in names:
            file = os.path.join(root, name)
            size = os.path.getsize(file)
            if sizes.get(file) != size:
                atomic_write(join(path, os.path.relpath(file, directory)), read_existing(file))
                sizes[file] = size


def _temporary_name(path: str) -> str:
    """A hidden name beside `path` with the same ending, of this thread of this process alone."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{os.getpid()}-{threading.get_ident()}-{name}")


def remove_partial_files(directory: str) -> None:
    """Deletes what writers that were killed half-way left in `directory`, where nobody else may be writing.

    In a bucket nothing is left: an object appears when all of it is there.
    """
    for name in [] if is_remote(directory) else list_names(directory):
        if re.match(r"\.\d+-\d+-", name):
            path = os.path.join(directory, name)
            (shutil.rmtree if os.path.isdir(path) else os.remove)(path)


def exists(path: str) -> bool:
    """Whether there is a file or a folder."""
    return _gcs().exists(path) if is_remote(path) else os.path.exists(path)


def rename(path: str, new_path: str) -> None:
    """Gives a file or folder a new name, a file over the one that may stand there; in a bucket a file only."""
    (_gcs().rename if is_remote(path) else os.replace)(path, new_path)


def remove(path: str) -> None:
    """Deletes a file."""
    (_gcs().remove if is_remote(path) else os.remove)(path)


def make_directory(directory: str) -> None:
    """Makes a folder and those above it, where they are not there yet; a bucket has none."""
    if directory and not is_remote(directory):
        os.makedirs(directory, exist_ok=True)


def list_names(directory: str) -> list[str]:
    """The names in a folder, without slashes; none where there is no such folder."""
    if is_remote(directory):
        return _gcs().list_names(directory)
    return os.listdir(directory) if os.path.isdir(directory) else []
