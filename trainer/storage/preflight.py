"""Checks, before anything else is done, that the paths of a job can be read and written."""

import os
import tempfile
from collections.abc import Mapping

from trainer.errors import UserError
from trainer.storage import files


def check_buckets(*, read: Mapping[str, str], written: Mapping[str, str], timeout_secs: float) -> None:
    """Raises UserError if a bucket does not exist or does not allow what the job needs.

    `read` and `written` are paths by the flag that names them; those that are not in a bucket are ignored.
    """
    remote_read = {flag: path for flag, path in read.items() if files.is_remote(path)}
    remote_written = {flag: path for flag, path in written.items() if files.is_remote(path)}
    if not remote_read and not remote_written:
        return
    from trainer.storage import gcs

    gcs.set_retry_timeout(timeout_secs)
    for flag, path in {**remote_read, **remote_written}.items():
        gcs.check_readable(path, flag=flag)
    for flag, path in remote_written.items():
        gcs.check_writable(path, flag=flag)


def check_local_directory(directory: str, *, flag: str) -> None:
    """Creates a local directory and raises UserError if nothing can be written there; check_buckets covers gs://."""
    if files.is_remote(directory):
        return
    try:
        files.make_directory(directory)
        # A name of its own: several jobs may start at the same time. This one is that of a partial file.
        tempfile.TemporaryDirectory(prefix=f".{os.getpid()}-0-", dir=directory, ignore_cleanup_errors=True).cleanup()
    except OSError as error:
        raise UserError(
            f"--{flag}={directory} cannot be written ({error.strerror}): grant write access, or pass another folder."
        ) from None
