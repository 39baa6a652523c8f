"""Reads and atomic writes of files, with one interface for local disks and buckets. Does not import TensorFlow.

Paths that start with gs:// go through trainer.storage.gcs, which is imported when the first one is used: a job
without a bucket does not load google-cloud-storage. All functions raise OSError.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from trainer.errors import UserError

# Raised when a damaged .npz file is read: by its zip structure, the CRC-32 or header of an array, or an early end.
CORRUPT_ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError)


def _gcs() -> ModuleType:
    from trainer.storage import gcs

    return gcs


def is_remote(path: str) -> bool:
    """Whether the path is a URL such as gs://bucket/name."""
    return "://" in path


def retry_count() -> int:
    """Number of requests to a bucket that this process had to retry."""
    module = sys.modules.get("trainer.storage.gcs")
    return module.retry_count() if module else 0


def join(directory: str, name: str) -> str:
    """The path of `name` in a folder."""
    return f"{directory.rstrip('/')}/{name}" if is_remote(directory) else os.path.join(directory, name)


def read(path: str) -> bytes | None:
    """The contents of a file, or None if it does not exist. Raises OSError for other failures."""
    try:
        if is_remote(path):
            return _gcs().read(path)
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):  # the latter where a parent is a file
        return None


def read_existing(path: str) -> bytes:
    """The contents of a file. Raises OSError, FileNotFoundError if it does not exist."""
    contents = read(path)
    if contents is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return contents


def content_hash(path: str) -> str | None:
    """The MD5 of a file as hex, None if it does not exist. A bucket stores it, so an object is rarely downloaded."""
    if is_remote(path) and (info := _gcs().stat(path)) and info.content_hash:
        return info.content_hash
    contents = read(path)
    return None if contents is None else hashlib.md5(contents, usedforsecurity=False).hexdigest()


def read_range(path: str, start: int, end: int) -> bytes | None:
    """The bytes of a file from `start` to `end`, exclusive, or None if the file does not exist."""
    try:
        if is_remote(path):
            return _gcs().read(path, start=start, end=end)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    except FileNotFoundError:
        return None


def parallel(function: Callable, values: Iterable, *, workers: int = 16) -> list:
    """`[function(value) for value in values]`, computed on `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, values))


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path of the file or folder at `path`: the path itself, or a copy that exists during the block."""
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
    """The value in a JSON file, or None if the file does not exist. Raises UserError if it is not JSON."""
    contents = read(path)
    try:
        return None if contents is None else json.loads(contents)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"{path} is not JSON ({error}): restore the file.") from None


def read_json_object(path: str) -> dict[str, Any] | None:
    """As read_json, of a file that holds an object: UserError if it holds another value."""
    value = read_json(path)
    if not isinstance(value, dict) and (value is not None or exists(path)):
        raise UserError(f"{path} holds {json.dumps(value)[:100]}, expected a JSON object: restore the file.")
    return value


def check_links(directory: str) -> None:
    """Raises UserError if a local folder has a symbolic link to a file outside of it, at any depth.

    A job would read that file as its own, or write into it. Links to folders are followed: a user may keep checkpoints on
    another disk. A bucket has no links.
    """
    if is_remote(directory):
        return
    for root, _, names in os.walk(directory):
        for path in (os.path.join(root, name) for name in names):
            target = os.path.realpath(path)
            if os.path.islink(path) and os.path.commonpath([target, os.path.realpath(directory)]) != os.path.realpath(
                directory
            ):
                raise UserError(f"{path} is a symbolic link to {target}, outside of {directory}: remove the link.")


def atomic_write(path: str, contents: bytes | memoryview | str) -> None:
    """Writes `contents` (str as UTF-8) to a temporary file and renames it: a reader never sees a partial file.

    Raises OSError, and then leaves the previous file unchanged.
    """
    contents = contents.encode() if isinstance(contents, str) else contents
    if is_remote(path):
        _gcs().write(path, contents)  # an object appears when its upload is complete
        return
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(contents)


def write_json(path: str, value: object) -> None:
    """Writes a value as indented JSON; atomic."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """A local path to write a file to. It becomes `path` at the end of the block; deleted if the block raises."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            temporary = os.path.join(directory, os.path.basename(path))
            yield temporary
            with open(temporary, "rb") as file:
                _gcs().write(path, file.read())
        return
    _remove_abandoned(path)
    temporary = _temporary_name(path)
    with contextlib.suppress(FileNotFoundError):  # of a killed process with the same id, or a link
        os.remove(temporary)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure can keep the new name and lose the contents
        rename(temporary, path)
    finally:
        if exists(temporary):
            remove(temporary)


def preallocate(path: str, size: int) -> None:
    """Reserves `size` bytes for a local file that a library will write, where the system supports it (Linux).

    Raises OSError if the disk is full. HDF5 itself does not raise on a full disk: it ends the process.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # both mean: not supported by the filesystem
                    raise


@contextlib.contextmanager
def atomic_directory(directory: str) -> Iterator[str]:
    """As `atomic_path`, for a folder; it replaces an existing folder."""
    if is_remote(directory):
        with tempfile.TemporaryDirectory() as parent:
            temporary = os.path.join(parent, os.path.basename(directory.rstrip("/")))
            yield temporary
            _gcs().upload_tree(temporary, directory)
        return
    _remove_abandoned(directory)
    temporary = _temporary_name(directory)
    try:
        yield temporary
        if exists(directory):
            previous = _temporary_name(directory + ".before")
            rename(directory, previous)
            rename(temporary, directory)
            shutil.rmtree(previous)
        else:
            make_directory(os.path.dirname(directory))
            rename(temporary, directory)
    finally:
        if exists(temporary):
            shutil.rmtree(temporary)


def upload_changed_files(directory: str, path: str, sizes: dict[str, int]) -> None:
    """Copies the files below a local folder whose size differs from `sizes` to `path`, and updates `sizes` in place."""
    for root, _, names in os.walk(directory):
        for name in names:
            file = os.path.join(root, name)
            size = os.path.getsize(file)
            if sizes.get(file) != size:
                atomic_write(join(path, os.path.relpath(file, directory)), read_existing(file))
                sizes[file] = size


def _temporary_name(path: str) -> str:
    """A hidden name in the same folder, with the same file extension, unique to this thread of this process and host."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{os.getpid()}-{_host_number()}-{threading.get_ident()}-{name}")


def _host_number() -> int:
    return zlib.crc32(socket.gethostname().encode())


def _remove_abandoned(path: str) -> None:
    """Deletes the temporary files that killed processes of this host left of `path`."""
    directory, name = os.path.split(path.rstrip("/"))
    if not os.path.isdir(directory or "."):
        return
    pattern = re.compile(rf"\.(\d+)-{_host_number()}-\d+-{re.escape(name)}")
    for other in os.listdir(directory or "."):
        match = pattern.fullmatch(other)
        if match and not _is_running(int(match[1])):
            with contextlib.suppress(FileNotFoundError):  # another writer deletes it too
                _remove_tree(os.path.join(directory, other))


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _remove_tree(path: str) -> None:
    """Deletes a file, or a folder with its contents."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


def remove_partial_files(directory: str) -> None:
    """Deletes the temporary files of killed writers. No other process may be writing to `directory`.

    A bucket has none: an object appears when its upload is complete.
    """
    if is_remote(directory):
        return
    for name in list_names(directory):
        if re.match(r"\.\d+-\d+-", name):
            _remove_tree(os.path.join(directory, name))


def exists(path: str) -> bool:
    """Whether the file or folder exists."""
    return _gcs().exists(path) if is_remote(path) else os.path.exists(path)


def rename(path: str, new_path: str) -> None:
    """Renames a file or folder and replaces an existing file; in a bucket, files only."""
    if is_remote(path):
        _gcs().rename(path, new_path)
    else:
        os.replace(path, new_path)


def remove(path: str) -> None:
    """Deletes a file."""
    if is_remote(path):
        _gcs().remove(path)
    else:
        os.remove(path)


def make_directory(directory: str) -> None:
    """Creates a folder and its parents where they do not exist; no operation in a bucket, which has no folders."""
    if directory and not is_remote(directory):
        os.makedirs(directory, exist_ok=True)


def list_names(directory: str) -> list[str]:
    """The names in a folder, without slashes; empty if the folder does not exist."""
    if is_remote(directory):
        return _gcs().list_names(directory)
    return os.listdir(directory) if os.path.isdir(directory) else []
