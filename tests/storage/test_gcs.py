"""Listing, retries and errors of Google Cloud Storage, with its real client and an emulator."""

import time

import pytest

from tests.support.bucket import FAULTS, SERVICE_ACCOUNT
from trainer.errors import UserError
from trainer.storage import files, gcs


@pytest.mark.parametrize(
    ("url", "message"), [("s3://bucket/x", "pass a local path or gs://"), ("gs:///x", "names no bucket")]
)
def test_a_url_without_a_gcs_bucket_is_the_users_error(url, message):
    with pytest.raises(UserError, match=message):
        gcs.split_url(url)


@pytest.mark.slow
def test_a_listing_takes_one_request_per_thousand_objects(bucket_url):
    files.parallel(lambda i: gcs.write(f"{bucket_url}/n/{i:04d}", b"x"), range(2100))
    bucket_url.emulator.control(forget=True)
    names = list(gcs.list_tree(f"{bucket_url}/n"))
    assert names == [f"{i:04d}" for i in range(2100)]
    assert len(bucket_url.emulator.requests()) == 3


@pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda fault: str(*fault.values()) if "status" in fault else next(iter(fault))
)
def test_every_operation_is_retried_and_counted(bucket_url, fault):
    path = f"{bucket_url}/x"
    gcs.write(path, b"")  # the client requests the bucket's metadata once, on a thread
    time.sleep(0.1)
    retries = gcs.retry_count()
    operations = [
        lambda: gcs.write(path, b"contents"),
        lambda: gcs.write(path, b"9" * 9_000_000),
        lambda: gcs.read(path),
        lambda: gcs.read(path, start=0, end=3),
        lambda: gcs.list_tree(bucket_url),
        lambda: gcs.stat(path),
        lambda: gcs.rename(path, path + "2"),
        lambda: gcs.remove(path + "2"),
    ]
    for operation in operations:
        bucket_url.emulator.inject({**fault, "times": 1})
        operation()
    assert gcs.retry_count() == retries + len(operations)
    assert gcs.list_tree(bucket_url) == {}


def test_one_failure_in_ten_requests_loses_nothing(bucket_url):
    bucket_url.emulator.inject(*({**fault, "share": 0.02} for fault in FAULTS))
    retries = gcs.retry_count()
    files.parallel(lambda i: gcs.write(f"{bucket_url}/{i:03d}", bytes([i % 256]) * 1000), range(300))
    contents = files.parallel(lambda i: gcs.read(f"{bucket_url}/{i:03d}"), range(300))
    assert contents == [bytes([i % 256]) * 1000 for i in range(300)]
    assert len(gcs.list_tree(bucket_url)) == 300
    assert 20 < gcs.retry_count() - retries < 150


def test_an_outage_longer_than_the_timeout_is_an_error(bucket_url, monkeypatch):
    gcs.write(f"{bucket_url}/x", b"x")
    bucket_url.emulator.inject({"status": 503, "seconds": 1.5})
    assert gcs.read(f"{bucket_url}/x") == b"x"
    monkeypatch.setattr(gcs._retries, "timeout_secs", 0.5)
    bucket_url.emulator.inject({"status": 503, "seconds": 5})
    with pytest.raises(TimeoutError, match="unavailable for 0 s") as raised:
        gcs.read(f"{bucket_url}/x")
    assert raised.value.filename == f"{bucket_url}/x"


def test_a_request_without_a_response_is_retried(bucket_url, monkeypatch):
    monkeypatch.setattr(gcs, "_request_options", lambda: {"retry": None, "timeout": 0.3})
    gcs.write(f"{bucket_url}/x", b"x")
    bucket_url.emulator.inject({"delay": 2, "times": 1})
    started = time.monotonic()
    assert gcs.read(f"{bucket_url}/x") == b"x"
    assert time.monotonic() - started < 1.5


def test_a_missing_permission_names_the_service_account(monkeypatch):
    class Credentials:
        service_account_email = SERVICE_ACCOUNT

    class Client:
        _credentials = Credentials

    monkeypatch.setattr(gcs, "_client", Client)
    error = gcs.exceptions.Forbidden("GET https://x: no")
    assert gcs._how_to_grant("gs://photos/x", "roles/storage.objectUser", error) == (
        f"403 no - grant the service account {SERVICE_ACCOUNT} roles/storage.objectUser: gcloud storage buckets "
        f"add-iam-policy-binding gs://photos --member=serviceAccount:{SERVICE_ACCOUNT} --role=roles/storage.objectUser"
    )
