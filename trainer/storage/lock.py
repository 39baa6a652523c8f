"""One job at a time on a job_dir, local or in a bucket: a second one is told, and a dead one does not stand in the way."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from absl import logging

from trainer.errors import UserError
from trainer.storage import files

LOCK_NAME = "lease.json"


LEASE_SECONDS = 60.0  # how long a lease in a bucket outlives its holder; it is renewed four times as often


@contextlib.contextmanager
def hold(directory: str, *, on_lost: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds `directory` for the block. Raises UserError if another live job holds it.

    On a disk the operating system keeps the lock for as long as the process lives, so a killed one leaves none. In a
    bucket it is an object that its holder writes again and again, each time in place of its own last one (generation
    precondition); `on_lost` is called, on a thread, if another job has taken it meanwhile.
    """
    if files.is_remote(directory):
        with _hold_object(files.join(directory, LOCK_NAME), on_lost):
            yield
        return
    with open(os.path.join(directory, LOCK_NAME), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _held_by_another(directory, file.read().strip()) from None
        file.truncate(0)
        file.write(json.dumps(_holder()))
        file.flush()
        yield


def _holder() -> dict:
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T%z")}


def _held_by_another(directory: str, holder: str) -> UserError:
    return UserError(
        f"Another job is at work in {directory} ({holder}): wait for its end, stop it, or pass another --job_dir."
    )


@contextlib.contextmanager
def _hold_object(path: str, on_lost: Callable[[], None]) -> Iterator[None]:
    from trainer.storage import gcs

    mine = json.dumps({**_holder(), "id": uuid.uuid4().hex}).encode()
    generation = _take(path, mine)
    is_over = threading.Event()

    def renew() -> None:
        nonlocal generation
        while not is_over.wait(LEASE_SECONDS / 4):
            try:
                generation = _write_own(path, mine, generation)
            except FileExistsError:
                logging.error("Another job has taken %s, since this one had not renewed it in time.", path)
                on_lost()
                return
            except OSError as error:  # while nobody can write, nobody can take it either; what else fails will tell
                logging.warning("%s cannot be renewed: %s", path, error.strerror)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        with contextlib.suppress(OSError):  # it would run out by itself
            gcs.remove(path, generation=generation, patience_seconds=LEASE_SECONDS / 10)


def _write_own(path: str, mine: bytes, generation: int) -> int:
    """Writes the lease in place of that generation (0: of none); returns the new one. FileExistsError: it was another's."""
    from trainer.storage import gcs

    try:
        return gcs.write(path, mine, generation=generation, patience_seconds=LEASE_SECONDS / 2).generation
    except FileExistsError:
        found = gcs.stat(path)
        if found is None or files.read(path) != mine:
            raise
        return found.generation  # an attempt whose answer was lost had done it


def _take(path: str, mine: bytes) -> int:
    """The generation of the lease once it is ours. Waits for as long as one that stands there may still be alive.

    A live holder is known by its renewing it, so that no clock need agree with another.
    """
    from trainer.storage import gcs

    standing = gcs.stat(path)
    seen_at = time.monotonic()
    if standing:
        logging.warning("%s is held: waiting up to %.0f s to see whether its holder is alive.", path, LEASE_SECONDS)
    while True:
        with contextlib.suppress(FileExistsError):
            return _write_own(path, mine, standing.generation if standing and _is_over(seen_at) else 0)
        now = gcs.stat(path)
        if now and standing and now.generation != standing.generation:
            raise _held_by_another(os.path.dirname(path), (files.read(path) or b"").decode())
        if now and not standing:
            standing, seen_at = now, time.monotonic()
        time.sleep(min(1.0, LEASE_SECONDS / 20))


def _is_over(seen_at: float) -> bool:
    return time.monotonic() - seen_at >= LEASE_SECONDS
