"""Buckets: listing, rights, faults, whole objects, and the job end to end, on a real emulator behind real clients."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.data import file_checks, sampler, splits
from trainer.data.dataset import Folder, read_folder
from trainer.errors import UserError
from trainer.storage import files, gcs, lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of a hundredth."""
    monkeypatch.setattr(gcs, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(gcs, "_LONGEST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(gcs._State, "patience_seconds", 20.0)


def upload(directory: pathlib.Path, url: str) -> str:
    found_files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files.parallel(lambda p: gcs.write(f"{url}/{p.relative_to(directory)}", p.read_bytes()), found_files)
    return url


def same_folder(one: Folder, other: Folder) -> None:
    assert one.class_names == other.class_names
    assert one.bad_files == other.bad_files
    assert (one.kinds, one.sides) == (other.kinds, other.sides)
    for name in ("paths", "labels", "hashes"):
        np.testing.assert_array_equal(getattr(one.examples, name), getattr(other.examples, name))


def test_a_folder_in_a_bucket_is_what_it_is_on_disk(tmp_path, bucket_url):
    data = write_images(tmp_path / "data", {"cat": 6, "dog": 5}, size=60)
    image = (data / "cat" / "cat_000.jpg").read_bytes()
    (data / "dog" / "deep" / "er").mkdir(parents=True)
    names = {
        "dog/deep/er/a b#c?d%20é.jpg": image,
        "dog/same.jpg": image,
        "dog/large.jpg": image[:-2] + bytes(file_checks.HEAD_BYTES) + b"\xff\xd9",
        "dog/large_and_cut.jpg": image[:-2] + bytes(file_checks.HEAD_BYTES),
        "dog/large_with_a_film_behind.jpg": image + bytes(file_checks.HEAD_BYTES),
        "dog/large_text.jpg": b"text" * file_checks.HEAD_BYTES,
        **{"cat/empty.jpg": b"", "cat/cut.jpg": image[:-30], "cat/page.jpg": b"<html>", "cat/Thumbs.db": b"x"},
        **{".hidden/x.jpg": image, "cat/.x.jpg": image, "at_the_root.jpg": image},
    }
    for name, contents in names.items():
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(contents)
    (data / "dog" / "folder.jpg").mkdir()
    (data / "dog" / "folder.jpg" / "x.jpg").write_bytes(image)
    upload(data, f"{bucket_url}/some/data")
    gcs.write(f"{bucket_url}/some/data/cat/", b"")  # the console's placeholder of a folder
    gcs.write(f"{bucket_url}/some/data-2/owl/x.jpg", image)  # a neighbour of a longer name
    same_folder(read_folder(f"{bucket_url}/some/data/"), read_folder(str(data)))


def test_a_given_split_in_a_bucket_is_taken(tmp_path, bucket_url):
    for side in ("train", "val"):
        write_images(tmp_path / side, {"a": 2, "b": 2}, seed=len(side))
    upload(tmp_path, bucket_url)
    same_folder(read_folder(bucket_url), read_folder(str(tmp_path)))


def test_an_object_without_md5_is_read(tmp_path, bucket_url, monkeypatch):
    upload(write_images(tmp_path, {"a": 2, "b": 2}), bucket_url)
    listed = gcs.list_tree
    monkeypatch.setattr(gcs, "list_tree", lambda url: {
        name: known._replace(content_hash="", num_bytes=10**6) for name, known in listed(url).items()
    })  # fmt: skip
    same_folder(read_folder(bucket_url), read_folder(str(tmp_path)))


@pytest.mark.slow
def test_thousands_of_objects_take_a_request_for_each_thousand(bucket_url):
    files.parallel(lambda i: gcs.write(f"{bucket_url}/n/{i:04d}", b"x"), range(2100))
    bucket_url.emulator.control(forget=True)
    names = list(gcs.list_tree(f"{bucket_url}/n"))
    assert names == [f"{i:04d}" for i in range(2100)]
    assert len(bucket_url.emulator.requests()) == 3


def test_what_is_written_is_read_back_listed_renamed_and_removed(bucket_url):
    path = f"{bucket_url}/a/b"
    assert files.read(path) is None
    assert not files.exists(path)
    large = os.urandom(9_000_000)  # above 8 MB the client uploads in another way
    files.atomic_write(path, large)
    assert files.read(path) == large
    assert files.read_range(path, 5, 9) == large[5:9]
    assert files.exists(f"{bucket_url}/a")
    assert files.list_names(f"{bucket_url}/a") == ["b"]
    files.rename(path, path + ".damaged")
    assert files.list_names(f"{bucket_url}/a") == ["b.damaged"]
    files.remove(path + ".damaged")
    assert files.list_names(f"{bucket_url}/a") == []


def test_a_tree_appears_with_its_index_last_and_takes_the_place_of_the_one_before(bucket_url):
    url = f"{bucket_url}/model"
    for names in (["variables/one", "saved_model.pb"], ["variables/two", "fingerprint.pb", "saved_model.pb"]):
        bucket_url.emulator.control(forget=True)
        with files.atomic_directory(url) as temporary:
            for name in names:
                files.make_directory(os.path.dirname(f"{temporary}/{name}"))
                files.atomic_write(f"{temporary}/{name}", name)
            assert not [method for method, *_ in bucket_url.emulator.requests() if method == "POST"]
        assert sorted(gcs.list_tree(url)) == sorted(names)
        changes = [(method, path) for method, path, _ in bucket_url.emulator.requests() if method in ("POST", "DELETE")]
        assert changes[0][0] == ("DELETE" if "variables/two" in names else "POST")
        assert ("saved_model.pb" in changes[0][1]) == ("variables/two" in names)
    with pytest.raises(ZeroDivisionError), files.atomic_directory(url) as temporary:
        raise ZeroDivisionError
    assert files.read(f"{url}/saved_model.pb") == b"saved_model.pb"


FAULTS = [{"status": 429}, {"status": 500}, {"status": 503}, {"drop": True}, {"lose": True}]


@pytest.mark.parametrize(
    "fault", FAULTS, ids=lambda fault: str(*fault.values()) if "status" in fault else next(iter(fault))
)
def test_every_operation_survives_a_fault_and_counts_it(bucket_url, fault):
    path = f"{bucket_url}/x"
    gcs.write(path, b"")  # the library asks for the bucket itself once, on a thread
    time.sleep(0.1)
    before = gcs.retry_count()
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
        bucket_url.emulator.plant({**fault, "times": 1})
        operation()
    assert gcs.retry_count() == before + len(operations)
    assert gcs.list_tree(bucket_url) == {}


def test_one_request_in_ten_may_fail(bucket_url):
    bucket_url.emulator.plant(*({**fault, "share": 0.02} for fault in FAULTS))
    before = gcs.retry_count()
    files.parallel(lambda i: gcs.write(f"{bucket_url}/{i:03d}", bytes([i % 256]) * 1000), range(300))
    contents = files.parallel(lambda i: gcs.read(f"{bucket_url}/{i:03d}"), range(300))
    assert contents == [bytes([i % 256]) * 1000 for i in range(300)]
    assert len(gcs.list_tree(bucket_url)) == 300
    assert 20 < gcs.retry_count() - before < 150


def test_an_outage_is_waited_for_and_a_long_one_is_told(bucket_url, monkeypatch):
    gcs.write(f"{bucket_url}/x", b"x")
    bucket_url.emulator.plant({"status": 503, "seconds": 1.5})
    assert gcs.read(f"{bucket_url}/x") == b"x"
    monkeypatch.setattr(gcs._State, "patience_seconds", 0.5)
    bucket_url.emulator.plant({"status": 503, "seconds": 5})
    with pytest.raises(TimeoutError, match=r"no answer for 0 s \(503 planted\)|no answer for") as raised:
        gcs.read(f"{bucket_url}/x")
    assert raised.value.filename == f"{bucket_url}/x"


def test_an_answer_that_does_not_come_is_asked_for_again(bucket_url, monkeypatch):
    monkeypatch.setattr(gcs, "_options", lambda: {"retry": None, "timeout": 0.3})
    gcs.write(f"{bucket_url}/x", b"x")
    bucket_url.emulator.plant({"delay": 2, "times": 1})
    started = time.monotonic()
    assert gcs.read(f"{bucket_url}/x") == b"x"
    assert time.monotonic() - started < 1.5


KEY_OWNER = "trainer@project.iam.gserviceaccount.com"
DENIED = f"{KEY_OWNER} does not have storage.objects.list access to the Google Cloud Storage bucket."


@pytest.mark.slow
def test_what_is_missing_is_told_in_one_line_before_anything_else(bucket_url, tmp_path):
    """Each case: what is planted, where the paths lie, what is said."""
    upload(write_images(tmp_path / "data", {"a": 4, "b": 4}), f"{bucket_url}/data")
    url, local, job_dir = f"{bucket_url}/data", str(tmp_path / "data"), str(tmp_path / "job")
    elsewhere, in_bucket = "gs://no-such-bucket-here/x", f"{bucket_url}/job"
    grant_user = "roles/storage.objectUser: gcloud storage buckets add-iam-policy-binding gs://"
    cases = [
        ([], elsewhere, job_dir, f"--data_dir={elsewhere}: no such bucket"),
        ([], local, elsewhere, f"--job_dir={elsewhere}: no such bucket"),
        (
            [{"status": 403, "message": DENIED}],
            url,
            job_dir,
            f"{DENIED} - grant the account in use roles/storage.objectViewer",
        ),
        ([{"methods": ["POST"], "status": 403}], local, in_bucket, grant_user),
        ([{"methods": ["DELETE"], "status": 403}], local, in_bucket, grant_user),
        ([{"status": 401}], url, job_dir, "run `gcloud auth application-default login`"),
        ([], f"{bucket_url}/dat", job_dir, "does not exist: pass a folder with one sub-folder per class"),
    ]
    for faults, data_dir, job_dir, said in cases:
        bucket_url.emulator.plant(*faults)
        ended = run_command("trainer.task", f"--data_dir={data_dir}", f"--job_dir={job_dir}")
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
        assert said in ended.stderr
        assert not (tmp_path / "job").exists()


def test_the_service_account_in_use_is_named(monkeypatch):
    class Credentials:
        service_account_email = KEY_OWNER

    class Client:
        _credentials = Credentials

    monkeypatch.setattr(gcs, "_client", Client)
    error = gcs.exceptions.Forbidden("GET https://x: no")
    assert gcs._how_to_grant("gs://photos/x", "roles/storage.objectUser", error) == (
        f"403 no - grant the service account {KEY_OWNER} roles/storage.objectUser: gcloud storage buckets "
        f"add-iam-policy-binding gs://photos --member=serviceAccount:{KEY_OWNER} --role=roles/storage.objectUser"
    )


HOLD = """
import sys, time
from trainer import bucket, lease
lease.SECONDS = float(sys.argv[2])
bucket._PAUSE_SECONDS = 0.01
with lease.hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(bucket_url):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, bucket_url, "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_job_dir_in_a_bucket_is_held_by_a_living_job_and_taken_from_a_dead_one(bucket_url, holder, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    with pytest.raises(UserError, match=rf'Another job is at work .*"process": {holder.pid}'), lock.hold(bucket_url):
        pass
    holder.kill()
    holder.wait()
    killed_at = time.monotonic()
    with lock.hold(bucket_url):
        assert 1 < time.monotonic() - killed_at < 6
    with lock.hold(bucket_url):  # given back at the end of the block: nobody waits
        assert time.monotonic() - killed_at < 7
    assert files.list_names(bucket_url) == []


def test_of_many_jobs_that_start_at_once_one_gets_the_lease(bucket_url, monkeypatch):
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


def test_a_holder_that_lost_its_lease_hears_of_it_and_leaves_the_new_one_alone(bucket_url, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    lost = threading.Event()
    with lock.hold(bucket_url, on_lost=lost.set):
        gcs.write(f"{bucket_url}/{lock.LOCK_NAME}", b"of another job")
        assert lost.wait(10)
        assert gcs.read(f"{bucket_url}/{lock.LOCK_NAME}") == b"of another job"


def test_an_answer_lost_while_the_lease_is_renewed_loses_no_lease(bucket_url, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    lost = threading.Event()
    with lock.hold(bucket_url, on_lost=lost.set):
        before = gcs.retry_count()
        bucket_url.emulator.plant({"methods": ["POST"], "lose": True, "times": 2})
        deadline = time.monotonic() + 20
        while gcs.retry_count() < before + 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # for the renewals after that
    assert not lost.is_set()


@pytest.mark.slow
def test_a_picture_that_is_kept_is_fetched_once_for_all_passes(tmp_path, bucket_url):
    from trainer.data import input_pipeline
    from trainer.data.image_source import ImageSource
    from trainer.runtime import cluster, devices

    images = write_images(tmp_path, {"cat": 40, "dog": 40})
    url = upload(images, f"{bucket_url}/data")
    folder = read_folder(url)
    sides = splits.split_by_content(folder.examples, 0.2)
    options = {"image_size": 32, "cache": input_pipeline.Cache(True), "cache_dir": "", "read_parallelism": 8}
    side = np.arange(64, 80)
    kept = ImageSource(url, folder, sides, **options)
    bucket_url.emulator.control(forget=True)
    kept.decode(lambda count: None, worker=0)
    machine = devices.start(cluster.resolve({}), require_gpu=False)
    layout = sampler.ordered_epoch(16, batch_size=16, replicas=1)
    first, second = (
        next(
            iter(
                input_pipeline.batches(
                    layout,
                    source,
                    np.zeros(16),
                    transform=input_pipeline.BatchTransform("rescale", None, "float32"),
                    devices=machine,
                )
            )
        )
        for source in (kept.source(side), ImageSource(str(images), folder, sides, **options).source(side))
    )
    np.testing.assert_array_equal(first["x"], second["x"])  # the validation side, kept and from the disk
    fetched = [path for method, path, _ in bucket_url.emulator.requests()]
    assert len(fetched) == len(set(fetched)) == 80
