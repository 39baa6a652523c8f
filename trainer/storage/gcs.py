"""Google Cloud Storage beyond what tf.data reads: listing with hashes, checked transfers, conditions, retries, reasons.

Every call that fails in passing (429, 5xx, a connection that breaks, an answer that never comes, a checksum that does not
fit) is made again after growing pauses, for PATIENCE_SECONDS in all, and counted. What is left are OSErrors that say what
to do: FileNotFoundError, PermissionError (401 and 403), and TimeoutError where a later start may help. No TensorFlow.
"""

import base64
import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import google_crc32c
import requests
from absl import logging
from google.api_core import exceptions
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY

from trainer.errors import UserError

PARALLEL_TRANSFERS = 16  # objects of a tree at once


_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 20.0


_LOG_AFTER_RETRIES = 4


_INDEX = "saved_model.pb"  # without it no reader takes a folder for a SavedModel


_VIEWER, _USER = "roles/storage.objectViewer", "roles/storage.objectUser"


class ObjectInfo(NamedTuple):
    """What a listing tells of an object; `content_hash` is its MD5 as hex, empty where the bucket keeps none."""

    num_bytes: int
    content_hash: str
    generation: int
    updated: Any = None  # datetime by the bucket's clock


class _State:
    """Of this process: how long to keep trying, and how often it had to."""

    lock = threading.Lock()
    patience_seconds = 300.0
    retries = 0


def set_retry_timeout(seconds: float) -> None:
    """How long a call is tried again before it ends in TimeoutError; 300 s unless told."""
    _State.patience_seconds = seconds


def retry_count() -> int:
    """How many calls had to be made again so far in this process."""
    return _State.retries


def split_url(path: str) -> tuple[str, str]:
    """gs://bucket/name -> (bucket, name). Raises UserError for other schemes."""
    if not path.startswith("gs://"):
        raise UserError(f"{path} is not an address that can be read: pass a local path or gs://bucket/name.")
    name, _, rest = path.removeprefix("gs://").partition("/")
    if not name:
        raise UserError(f"{path} names no bucket: pass gs://bucket/name.")
    return name, rest


def read(path: str, *, start: int | None = None, end: int | None = None) -> bytes:
    """An object's bytes, or those from `start` up to and without `end`; a whole one is checked by its checksum."""
    whole = start is None and end is None

    def download() -> bytes:
        options = {"checksum": "auto" if whole else None, **_options()}
        return _blob(path).download_as_bytes(start=start, end=None if end is None else end - 1, **options)

    return _call(path, _VIEWER, download)


def write(
    path: str, contents: bytes | memoryview, *, generation: int | None = None, patience_seconds: float | None = None
) -> ObjectInfo:
    """Makes an object of the bytes: it appears whole or not at all, and its checksum was compared.

    With a `generation` (0: none) only in place of that one; raises FileExistsError if another stands there.
    """
    contents = bytes(contents)
    checksum = base64.b64encode(google_crc32c.Checksum(contents).digest()).decode()

    def upload() -> ObjectInfo:
        blob = _blob(path)
        blob.upload_from_string(contents, if_generation_match=generation, checksum="auto", **_options())
        if blob.crc32c != checksum or blob.size != len(contents):
            raise requests.ConnectionError(f"{path} arrived as {blob.size} bytes, {blob.crc32c}, not as {checksum}")
        return _object(blob)

    return _call(path, _USER, upload, missing=_NO_BUCKET, patience_seconds=patience_seconds)


def upload_tree(directory: str, url: str) -> None:
    """Uploads the files below a local folder, saved_model.pb last and gone first: a reader finds a whole tree or none."""
    files = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]
    names = [os.path.relpath(file, directory) for file in files]
    index = [name for name in names if "/" not in name]
    others = [name for name in names if "/" in name]
    before = list_tree(url)
    for name in sorted(set(before) - set(others), key=lambda name: (name != _INDEX, name)):
        remove(f"{url}/{name}")

    def upload(name: str) -> None:
        with open(os.path.join(directory, name), "rb") as file:
            write(f"{url}/{name}", file.read())

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        list(pool.map(upload, others))
    for name in sorted(index, key=lambda name: (name == _INDEX, name)):
        upload(name)


def download_tree(url: str, directory: str) -> None:
    """Downloads all objects below an address to a local folder."""

    def download(name: str) -> None:
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(read(f"{url}/{name}"))

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        list(pool.map(download, [name for name in list_tree(url) if not name.endswith("/")]))


def list_tree(directory: str) -> dict[str, ObjectInfo]:
    """Every object below an address, by its name relative to it, in order; one request for each 1,000 of them.

    Placeholders of empty folders end in a slash. Raises FileNotFoundError if there is no such bucket.
    """
    bucket, name = split_url(directory)
    prefix = name.rstrip("/") + "/" if name else ""
    found: dict[str, ObjectInfo] = {}
    token = ""
    while token is not None:  # page by page, so that a page that fails is all that has to be asked for again
        page, token = _call(
            directory, _VIEWER, functools.partial(_list_page, bucket, prefix, token), missing=_NO_BUCKET
        )
        found |= {name.removeprefix(prefix): known for name, known in page.items() if name != prefix}
    return {name: found[name] for name in sorted(found)}


def _list_page(bucket: str, prefix: str, token: str, size: int = 1000) -> tuple[dict[str, ObjectInfo], str | None]:
    fields = "items(name,size,md5Hash,generation,updated),nextPageToken"
    listing = _client().list_blobs(
        bucket, prefix=prefix, fields=fields, page_size=size, page_token=token or None, **_options()
    )
    page = {blob.name: _object(blob) for blob in next(listing.pages, ())}
    return page, listing.next_page_token


def list_names(directory: str) -> list[str]:
    """Names of the objects directly below an address, and of the folders there, without slashes."""
    return sorted({name.split("/")[0] for name in list_tree(directory)})


def stat(path: str) -> ObjectInfo | None:
    """What is known of an object, None if there is none."""

    def get() -> ObjectInfo:
        blob = _blob(path)
        blob.reload(**_options())
        return _object(blob)

    try:
        return _call(path, _VIEWER, get)
    except FileNotFoundError:
        return None


def exists(path: str) -> bool:
    """Whether there is an object of that name, or any below it."""
    bucket, name = split_url(path)
    prefix = name.rstrip("/") + "/" if name else ""
    below = functools.partial(_list_page, bucket, prefix, "", 1)
    return bool(name and stat(path)) or bool(_call(path, _VIEWER, below, missing=_NO_BUCKET)[0])


def remove(path: str, *, generation: int | None = None, patience_seconds: float | None = None) -> None:
    """Deletes an object; one that is gone already is no error, since the answer to the first attempt may be what was lost."""
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        delete = functools.partial(_blob(path).delete, if_generation_match=generation, **_options())
        _call(path, _USER, delete, patience_seconds=patience_seconds)


def rename(path: str, new_path: str) -> None:
    """Copies an object within the service under another name, then deletes the first."""

    def copy() -> None:
        token = None
        while True:
            token, *_ = _blob(new_path).rewrite(_blob(path), token=token, **_options())
            if token is None:
                return

    _call(path, _USER, copy)
    remove(path)


def check_readable(path: str, *, flag: str) -> None:
    """Raises UserError if what lies at `path` cannot be listed: no such bucket, no login, no rights."""
    bucket, prefix = split_url(path)
    with _as_user_error(path, flag):
        _call(path, _VIEWER, functools.partial(_list_page, bucket, prefix, "", 1), missing=_NO_BUCKET)


def check_writable(path: str, *, flag: str) -> None:
    """Raises UserError if nothing can be written, read back and deleted below `path`."""
    probe = f"{path.rstrip('/')}/.probe-{os.getpid()}-{threading.get_ident()}"
    with _as_user_error(path, flag):
        write(probe, b"written by a job's check of its rights; it can be deleted")
        read(probe)
        remove(probe)


@contextlib.contextmanager
def _as_user_error(path: str, flag: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise
    except OSError as error:
        raise UserError(f"--{flag}={path}: {error.strerror}") from None


_NO_BUCKET = "no such bucket: check the name, or make it with `gcloud storage buckets create`"


def _call(
    path: str,
    role: str,
    function: Callable,
    *,
    missing: str = "no such object",
    patience_seconds: float | None = None,
) -> Any:
    """function(), again after each failure that may pass; other failures as OSErrors with a reason."""
    attempts, seconds = 0, patience_seconds or _State.patience_seconds

    def on_failure(error: Exception) -> None:
        nonlocal attempts
        attempts += 1
        with _State.lock:
            _State.retries += 1
        if attempts == _LOG_AFTER_RETRIES:
            logging.warning("%s: %s; trying again for up to %.0f s.", path, _reason(error), seconds)

    def attempt() -> Any:
        try:
            return function()
        except DataCorruption as error:  # of a download: the next one may be whole
            raise requests.ConnectionError(str(error)) from error

    patience = DEFAULT_RETRY.with_delay(_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, 2.0).with_timeout(seconds)
    try:
        return patience(attempt, on_error=on_failure)()
    except exceptions.RetryError as error:
        reason = f"no answer for {seconds:.0f} s ({_reason(error.cause)}); start again when it answers"
        raise TimeoutError(errno.ETIMEDOUT, reason, path) from error
    except exceptions.NotFound as error:
        raise FileNotFoundError(errno.ENOENT, missing, path) from error
    except exceptions.PreconditionFailed as error:
        raise FileExistsError(errno.EEXIST, "another version of it was written meanwhile", path) from error
    except exceptions.Forbidden as error:
        raise PermissionError(errno.EACCES, _how_to_grant(path, role, error), path) from error
    except (exceptions.Unauthorized, GoogleAuthError) as error:
        raise PermissionError(errno.EACCES, _how_to_log_in(error), path) from error
    except exceptions.GoogleAPICallError as error:
        raise OSError(errno.EIO, _reason(error), path) from error


def _reason(error: Exception | None) -> str:
    """What went wrong, without addresses and stacks: `503 Service Unavailable`, or the kind of a broken connection."""
    if isinstance(error, exceptions.GoogleAPICallError):
        return f"{error.code} {error.message.split(': ', 1)[-1]}"[:300]
    return f"{type(error).__name__}: {error}"[:300]


def _how_to_grant(path: str, role: str, error: exceptions.Forbidden) -> str:
    email = getattr(_client()._credentials, "service_account_email", "")
    account = f"the service account {email}" if email else "the account in use"
    member = f"serviceAccount:{email}" if email else "user:YOU"
    return (
        f"{_reason(error)} - grant {account} {role}: gcloud storage buckets add-iam-policy-binding "
        f"gs://{split_url(path)[0]} --member={member} --role={role}"
    )


def _how_to_log_in(error: Exception) -> str:
    return (
        f"401, not logged in ({_reason(error).rstrip('.')}): run `gcloud auth application-default login`, or point "
        "GOOGLE_APPLICATION_CREDENTIALS at a key, or run as a service account"
    )


def _options() -> dict[str, Any]:
    """Of every call: the library's own retries off, since ours count; seconds to connect and between two bytes."""
    return {"retry": None, "timeout": (min(10.0, _State.patience_seconds), min(60.0, _State.patience_seconds))}


def _client() -> storage.Client:
    return _client_of(os.getpid())


@functools.lru_cache(1)
def _client_of(process: int) -> storage.Client:
    """One for each process: connections must not be shared with one that was forked off."""
    client = storage.Client(project=None)  # objects need none, and a personal login may have none
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=256)  # ten, requests' default, would be opened again and again
    client._http.mount("https://", adapter)
    client._http.mount("http://", adapter)
    return client


def _blob(path: str) -> storage.Blob:
    bucket, name = split_url(path)
    return _client().bucket(bucket).blob(name)


def _object(blob: storage.Blob) -> ObjectInfo:
    content_hash = base64.b64decode(blob.md5_hash).hex() if blob.md5_hash else ""
    return ObjectInfo(blob.size or 0, content_hash, blob.generation or 0, blob.updated)
