"""Allows one job at a time on a job_dir, local or in a bucket. The lock of a killed job does not block the next one."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from absl import logging

from trainer.errors import UserError, require_posix
from trainer.storage import files

LOCK_NAME = "lease.json"
LEASE_SECONDS = 60.0  # a lease in a bucket expires after this time; it is renewed four times as often


@contextlib.contextmanager
def hold(directory: str, *, on_lost: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of `directory` during the block. Raises UserError if another running job holds it.

    On a local disk the operating system releases the lock when the process ends, killed or not. In a bucket the lock is
    an object that its holder renews, each time in place of its own last generation; `on_lost` is called, on a thread,
    if another job has taken it.
    """
    path = files.join(directory, LOCK_NAME)
    if files.is_remote(directory):
        with _hold_object(path, on_lost):
            yield
        return
    require_posix()
    import fcntl

    with os.fdopen(_open_lock(path), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _held_by_another(directory, file.read().strip()) from None
        file.truncate(0)
        file.write(json.dumps(_holder()))
        file.flush()
        yield


def _open_lock(path: str) -> int:
    """Opens the local lock file, new or not. Raises UserError for a link, whose target would be overwritten."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a symbolic link, expected the lock of a job: remove the link.") from None
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"{path} has another name too (a hard link), expected the lock of a job: remove it.")
    return descriptor


def _holder() -> dict[str, object]:
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T%z")}


def _held_by_another(directory: str, holder: str) -> UserError:
    return UserError(
        f"Another job holds {directory} ({holder}): wait until it ends, stop it, or pass another --job_dir."
    )


@contextlib.contextmanager
def _hold_object(path: str, on_lost: Callable[[], None]) -> Iterator[None]:
    from trainer.storage import gcs

    contents = json.dumps({**_holder(), "id": uuid.uuid4().hex}).encode()
    generation = _acquire(path, contents)
    is_released, is_lost = threading.Event(), threading.Event()

    def renew() -> None:
        nonlocal generation
        while not is_released.wait(LEASE_SECONDS / 4):
            try:
                generation = _write_lease(path, contents, generation)
            except FileExistsError:
                logging.error("Another job has taken %s, because this job did not renew it in time.", path)
                is_lost.set()
                on_lost()
                return
            except (
                OSError
            ) as error:  # a bucket that nobody can write to gives the lease to nobody; the job's writes fail too
                logging.warning("%s cannot be renewed: %s", path, error.strerror)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_released.set()
        thread.join()
        if not is_lost.is_set():
            with contextlib.suppress(OSError):  # the lease expires in any case
                gcs.remove(path, generation=generation, timeout_secs=LEASE_SECONDS / 10)


def _write_lease(path: str, contents: bytes, generation: int) -> int:
    """Replaces `generation` of the lease (0: creates it) and returns the new generation.

    Raises FileExistsError if the lease belongs to another job.
    """
    from trainer.storage import gcs

    try:
        return gcs.write(path, contents, generation=generation, timeout_secs=LEASE_SECONDS / 2).generation
    except FileExistsError:
        info = gcs.stat(path)
        if info is None or files.read(path) != contents:
            raise
        return info.generation  # an earlier attempt succeeded, but its response was lost


def _acquire(path: str, contents: bytes) -> int:
    """Waits until an existing lease is renewed or expires; returns the generation of the acquired lease.

    Raises UserError if it is renewed. A renewal, not a timestamp, shows that the holder is alive: the clocks of the
    machines may differ.
    """
    from trainer.storage import gcs

    other = gcs.stat(path)
    observed_at = time.monotonic()
    if other:
        logging.warning("%s is held: waiting up to %.0f s to see whether its holder is alive.", path, LEASE_SECONDS)
    while True:
        is_expired = time.monotonic() - observed_at >= LEASE_SECONDS
        with contextlib.suppress(FileExistsError):
            return _write_lease(path, contents, other.generation if other and is_expired else 0)
        current = gcs.stat(path)
        if current and other and current.generation != other.generation:
            raise _held_by_another(os.path.dirname(path), (files.read(path) or b"").decode())
        if current and not other:
            other, observed_at = current, time.monotonic()
        time.sleep(min(1.0, LEASE_SECONDS / 20))
