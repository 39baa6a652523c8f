"""Two jobs never write to one job_dir, and the lock of a killed job does not block the next one."""

import subprocess
import sys
import threading
import time

import pytest

from trainer.errors import UserError
from trainer.storage import files, gcs, lock

HOLDER = """
import sys, time
from trainer.storage import lock
lock.LEASE_SECONDS = 2.0
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(directory: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, directory], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_local_job_dir_is_locked_until_its_job_ends(tmp_path):
    holder = start_holder(str(tmp_path))
    try:
        message = rf'Another job holds .*"process": {holder.pid}'
        with pytest.raises(UserError, match=message), lock.hold(str(tmp_path)):
            pass
    finally:
        kill(holder)
    for _ in range(2):  # the end of the block releases the lock
        with lock.hold(str(tmp_path)):
            pass


def test_a_job_dir_in_a_bucket_is_locked_until_its_job_ends(bucket_url, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    holder = start_holder(bucket_url)
    try:
        message = rf'Another job holds .*"process": {holder.pid}'
        with pytest.raises(UserError, match=message), lock.hold(bucket_url):
            pass
    finally:
        kill(holder)
    killed_at = time.monotonic()
    with lock.hold(bucket_url):
        assert 1 < time.monotonic() - killed_at < 6
    with lock.hold(bucket_url):  # the end of the block releases the lock
        assert time.monotonic() - killed_at < 7
    assert files.list_names(bucket_url) == []


def test_one_of_many_simultaneous_jobs_gets_the_lease(bucket_url, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    outcomes, is_over = [], threading.Event()

    def compete():
        try:
            with lock.hold(bucket_url):
                outcomes.append("held")
                is_over.wait(20)
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 6 and any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
    is_over.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", *["refused"] * 5]


def test_a_lost_lease_is_reported_and_not_deleted(bucket_url, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    is_lost = threading.Event()
    path = files.join(bucket_url, lock.LOCK_NAME)
    with lock.hold(bucket_url, on_lost=is_lost.set):
        gcs.write(path, b"of another job")
        assert is_lost.wait(10)
    assert gcs.read(path) == b"of another job"


def test_a_renewal_whose_response_is_lost_keeps_the_lease(bucket_url, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    is_lost = threading.Event()
    with lock.hold(bucket_url, on_lost=is_lost.set):
        retries = gcs.retry_count()
        bucket_url.emulator.inject({"methods": ["POST"], "lose": True, "times": 2})
        deadline = time.monotonic() + 20
        while gcs.retry_count() < retries + 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # for the renewals after that
    assert not is_lost.is_set()
