"""Google Cloud Storage beyond what tf.data reads: listings with hashes, verified transfers, preconditions and retries.

Transient failures (429, 5xx, a broken connection, a timeout, a checksum mismatch) are retried with exponential backoff
until the retry timeout (set_retry_timeout) and counted (retry_count). Other failures are raised as OSErrors whose
`strerror` says what to do: FileNotFoundError, PermissionError (401 and 403), and TimeoutError where a later start may
succeed. Does not import TensorFlow.
"""

import base64
import contextlib
import dataclasses
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

PARALLEL_TRANSFERS = 16  # objects of one tree

_FIRST_DELAY_SECS = 0.5
_MAX_DELAY_SECS = 20.0
_LOG_AFTER_RETRIES = 4
_SAVED_MODEL_INDEX = "saved_model.pb"  # TensorFlow recognizes a SavedModel by this file
_VIEWER_ROLE = "roles/storage.objectViewer"
_USER_ROLE = "roles/storage.objectUser"
_NO_BUCKET = "no such bucket: check the name, or create it with `gcloud storage buckets create`"


class ObjectInfo(NamedTuple):
    """Metadata of an object; `content_hash` is its MD5 as hex, empty where the bucket stores none."""

    num_bytes: int
    content_hash: str
    generation: int


@dataclasses.dataclass
class _Retries:
    """State of this process."""

    timeout_secs: float = 300.0
    count: int = 0


_retries = _Retries()
_retries_lock = threading.Lock()


def set_retry_timeout(timeout_secs: float) -> None:
    """Sets how long a call is retried before it raises TimeoutError; the default is 300 s."""
    _retries.timeout_secs = timeout_secs


def retry_count() -> int:
    """Number of retries in this process."""
    return _retries.count


def split_url(path: str) -> tuple[str, str]:
    """gs://bucket/name -> (bucket, name). Raises UserError for other schemes."""
    if not path.startswith("gs://"):
        raise UserError(f"{path} has a scheme that is not supported: pass a local path or gs://bucket/name.")
    bucket, _, name = path.removeprefix("gs://").partition("/")
    if not bucket:
        raise UserError(f"{path} names no bucket: pass gs://bucket/name.")
    return bucket, name


def read(path: str, *, start: int | None = None, end: int | None = None) -> bytes:
    """An object's contents, with their checksum verified, or the bytes from `start` to `end`, exclusive."""
    is_complete = start is None and end is None

    def download() -> bytes:
        return _blob(path).download_as_bytes(
            start=start,
            end=None if end is None else end - 1,
            checksum="auto" if is_complete else None,
            **_request_options(),
        )

    return _call(path, _VIEWER_ROLE, download)


def write(
    path: str, contents: bytes | memoryview, *, generation: int | None = None, timeout_secs: float | None = None
) -> ObjectInfo:
    """Writes an object and verifies its checksum; atomic.

    With a `generation`, replaces only that generation of the object (0: only creates it) and raises FileExistsError if
    the current one differs.
    """
    contents = bytes(contents)
    checksum = base64.b64encode(google_crc32c.Checksum(contents).digest()).decode()

    def upload() -> ObjectInfo:
        blob = _blob(path)
        blob.upload_from_string(contents, if_generation_match=generation, checksum="auto", **_request_options())
        if blob.crc32c != checksum or blob.size != len(contents):
            raise requests.ConnectionError(f"{path} has {blob.size} bytes, {blob.crc32c}; expected {checksum}")
        return _object_info(blob)

    return _call(path, _USER_ROLE, upload, missing=_NO_BUCKET, timeout_secs=timeout_secs)


def upload_tree(directory: str, url: str) -> None:
    """Uploads a local folder and deletes the other objects at `url`.

    saved_model.pb is deleted first and uploaded last: a reader finds a complete SavedModel or none.
    """
    paths = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]
    names = [os.path.relpath(path, directory) for path in paths]
    top_level = [name for name in names if "/" not in name]
    nested = [name for name in names if "/" in name]
    for name in sorted(set(list_tree(url)) - set(nested), key=lambda name: (name != _SAVED_MODEL_INDEX, name)):
        remove(_child(url, name))

    def upload(name: str) -> None:
        with open(os.path.join(directory, name), "rb") as file:
            write(_child(url, name), file.read())

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        list(pool.map(upload, nested))
    for name in sorted(top_level, key=lambda name: (name == _SAVED_MODEL_INDEX, name)):
        upload(name)


def download_tree(url: str, directory: str) -> None:
    """Downloads all objects below `url` to a local folder."""

    def download(name: str) -> None:
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(read(_child(url, name)))

    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        list(pool.map(download, [name for name in list_tree(url) if not name.endswith("/")]))


def list_tree(url: str) -> dict[str, ObjectInfo]:
    """All objects below `url` by their relative names, sorted; one request per 1,000 objects.

    Placeholders of empty folders end with a slash. Raises FileNotFoundError if the bucket does not exist.
    """
    bucket, name = split_url(url)
    prefix = name.rstrip("/") + "/" if name else ""
    objects: dict[str, ObjectInfo] = {}
    page_token: str | None = ""
    while page_token is not None:  # one call per page: a failure repeats one page, not the listing
        list_page = functools.partial(_list_page, bucket, prefix, page_token)
        page, page_token = _call(url, _VIEWER_ROLE, list_page, missing=_NO_BUCKET)
        objects |= {name.removeprefix(prefix): info for name, info in page.items() if name != prefix}
    return {name: objects[name] for name in sorted(objects)}


def _list_page(
    bucket: str, prefix: str, page_token: str = "", page_size: int = 1000
) -> tuple[dict[str, ObjectInfo], str | None]:
    """Objects by name, and the token of the next page, None after the last one."""
    listing = _client().list_blobs(
        bucket,
        prefix=prefix,
        fields="items(name,size,md5Hash,generation),nextPageToken",
        page_size=page_size,
        page_token=page_token or None,
        **_request_options(),
    )
    page = {blob.name: _object_info(blob) for blob in next(listing.pages, ())}
    return page, listing.next_page_token


def list_names(url: str) -> list[str]:
    """Names of the objects and folders directly below `url`, without slashes."""
    return sorted({name.split("/")[0] for name in list_tree(url)})


def stat(path: str) -> ObjectInfo | None:
    """Metadata of an object, None if it does not exist."""

    def get() -> ObjectInfo:
        blob = _blob(path)
        blob.reload(**_request_options())
        return _object_info(blob)

    try:
        return _call(path, _VIEWER_ROLE, get)
    except FileNotFoundError:
        return None


def exists(path: str) -> bool:
    """Whether there is an object with that name, or one below it."""
    bucket, name = split_url(path)
    prefix = name.rstrip("/") + "/" if name else ""
    list_first = functools.partial(_list_page, bucket, prefix, page_size=1)
    return bool(name and stat(path)) or bool(_call(path, _VIEWER_ROLE, list_first, missing=_NO_BUCKET)[0])


def remove(path: str, *, generation: int | None = None, timeout_secs: float | None = None) -> None:
    """Deletes an object, with a `generation` only that one.

    A missing object is not an error: a previous attempt may have deleted it before its response was lost.
    """
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        delete = functools.partial(_blob(path).delete, if_generation_match=generation, **_request_options())
        _call(path, _USER_ROLE, delete, timeout_secs=timeout_secs)


def rename(path: str, new_path: str) -> None:
    """Copies an object to another name within the service, then deletes the original."""

    def copy() -> None:
        token = None
        while True:
            token, *_ = _blob(new_path).rewrite(_blob(path), token=token, **_request_options())
            if token is None:
                return

    _call(path, _USER_ROLE, copy)
    remove(path)


def check_readable(path: str, *, flag: str) -> None:
    """Raises UserError if `path` cannot be listed: bucket, credentials or permissions are missing."""
    bucket, prefix = split_url(path)
    with _as_user_error(path, flag):
        _call(path, _VIEWER_ROLE, functools.partial(_list_page, bucket, prefix, page_size=1), missing=_NO_BUCKET)


def check_writable(path: str, *, flag: str) -> None:
    """Raises UserError unless an object below `path` can be written, read and deleted."""
    probe = _child(path, f".probe-{os.getpid()}-{threading.get_ident()}")
    with _as_user_error(path, flag):
        write(probe, b"Written by the permission check of a training job. It can be deleted.")
        read(probe)
        remove(probe)


@contextlib.contextmanager
def _as_user_error(path: str, flag: str) -> Iterator[None]:
    """Raises a UserError for an OSError other than TimeoutError, after which a retry may succeed."""
    try:
        yield
    except TimeoutError:
        raise
    except OSError as error:
        raise UserError(f"--{flag}={path}: {error.strerror}") from None


def _call(
    path: str,
    role: str,
    function: Callable,
    *,
    missing: str = "no such object",
    timeout_secs: float | None = None,
) -> Any:
    """Returns function(), retried after transient failures; raises OSError with a reason for other failures."""
    timeout_secs = timeout_secs or _retries.timeout_secs
    attempts = 0

    def on_failure(error: Exception) -> None:
        nonlocal attempts
        attempts += 1
        with _retries_lock:
            _retries.count += 1
        if attempts == _LOG_AFTER_RETRIES:
            logging.warning("%s: %s; retrying for up to %.0f s.", path, _reason(error), timeout_secs)

    def attempt() -> Any:
        try:
            return function()
        except DataCorruption as error:  # the library does not retry a download with a wrong checksum
            raise requests.ConnectionError(str(error)) from error

    retry = DEFAULT_RETRY.with_delay(_FIRST_DELAY_SECS, _MAX_DELAY_SECS, 2.0).with_timeout(timeout_secs)
    try:
        return retry(attempt, on_error=on_failure)()
    except exceptions.RetryError as error:
        reason = f"unavailable for {timeout_secs:.0f} s ({_reason(error.cause)}); start again when it is available"
        raise TimeoutError(errno.ETIMEDOUT, reason, path) from error
    except exceptions.NotFound as error:
        raise FileNotFoundError(errno.ENOENT, missing, path) from error
    except exceptions.PreconditionFailed as error:
        raise FileExistsError(errno.EEXIST, "another process wrote another version", path) from error
    except exceptions.Forbidden as error:
        raise PermissionError(errno.EACCES, _how_to_grant(path, role, error), path) from error
    except (exceptions.Unauthorized, GoogleAuthError) as error:
        raise PermissionError(errno.EACCES, _how_to_log_in(error), path) from error
    except exceptions.GoogleAPICallError as error:
        raise OSError(errno.EIO, _reason(error), path) from error


def _reason(error: Exception | None) -> str:
    """`503 Service Unavailable` of a response, without its URL; else the exception's type and message."""
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
        f"401, not logged in ({_reason(error).rstrip('.')}): run `gcloud auth application-default login`, set "
        "GOOGLE_APPLICATION_CREDENTIALS to a key file, or run as a service account"
    )


def _request_options() -> dict[str, Any]:
    """Options of every request: no retries by the library, because _call counts them; timeouts in seconds."""
    connect_secs, read_secs = min(10.0, _retries.timeout_secs), min(60.0, _retries.timeout_secs)
    return {"retry": None, "timeout": (connect_secs, read_secs)}


def _client() -> storage.Client:
    return _client_of(os.getpid())


@functools.lru_cache(1)
def _client_of(process_id: int) -> storage.Client:
    """One client per process: a forked process must not share connections with its parent."""
    client = storage.Client(project=None)  # objects need no project, and a personal login may have none
    adapter = requests.adapters.HTTPAdapter(
        pool_maxsize=256
    )  # with the default of 10, connections are opened repeatedly
    client._http.mount("https://", adapter)
    client._http.mount("http://", adapter)
    return client


def _blob(path: str) -> storage.Blob:
    bucket, name = split_url(path)
    return _client().bucket(bucket).blob(name)


def _child(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def _object_info(blob: storage.Blob) -> ObjectInfo:
    content_hash = base64.b64decode(blob.md5_hash).hex() if blob.md5_hash else ""
    return ObjectInfo(blob.size or 0, content_hash, blob.generation or 0)
