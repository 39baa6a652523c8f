"""Missing buckets and permissions are one-line errors before the job writes anything."""

import pytest

from tests.support.bucket import DENIED, upload
from tests.support.images import write_images
from tests.support.processes import run_command
from trainer.errors import UserError
from trainer.storage import preflight

GRANT_USER = "roles/storage.objectUser: gcloud storage buckets add-iam-policy-binding gs://"


def test_a_bucket_that_does_not_exist_is_the_users_error(bucket_url):
    with pytest.raises(UserError, match=r"--data_dir=gs://no-such-bucket-here/x: no such bucket"):
        preflight.check_buckets(read={"data_dir": "gs://no-such-bucket-here/x"}, written={}, timeout_secs=20)


@pytest.mark.parametrize(("method", "path"), [("POST", ""), ("GET", "probe"), ("DELETE", "probe")])
def test_a_job_dir_needs_permission_to_write_read_and_delete(bucket_url, method, path):
    bucket_url.emulator.inject({"methods": [method], "path": path, "status": 403})
    with pytest.raises(UserError, match=rf"--job_dir={bucket_url}: 403 .* - grant the account in use roles/"):
        preflight.check_buckets(read={}, written={"job_dir": bucket_url}, timeout_secs=20)


def test_the_permission_check_leaves_nothing_behind(bucket_url):
    preflight.check_buckets(read={"data_dir": "/local"}, written={"job_dir": bucket_url}, timeout_secs=20)
    assert [path for method, path, _ in bucket_url.emulator.requests() if method == "DELETE"]


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--job_dir=.*/file/job cannot be written \(Not a directory\)"):
        preflight.check_local_directory(str(tmp_path / "file" / "job"), flag="job_dir")
    preflight.check_local_directory(str(tmp_path / "job"), flag="job_dir")
    assert list((tmp_path / "job").iterdir()) == []


@pytest.mark.slow
def test_the_job_checks_its_buckets_before_anything_else(bucket_url, tmp_path):
    local, local_job_dir = str(write_images(tmp_path / "data", {"a": 4, "b": 4})), str(tmp_path / "job")
    remote = upload(tmp_path / "data", f"{bucket_url}/data")
    missing, remote_job_dir = "gs://no-such-bucket-here/x", f"{bucket_url}/job"
    grant_viewer = f"{DENIED} - grant the account in use roles/storage.objectViewer"
    log_in = "run `gcloud auth application-default login`"
    no_folder = "does not exist: pass a folder with one sub-folder per class"
    cases = [  # fault, data_dir, job_dir, message
        (None, missing, local_job_dir, f"--data_dir={missing}: no such bucket"),
        (None, local, missing, f"--job_dir={missing}: no such bucket"),
        ({"status": 403, "message": DENIED}, remote, local_job_dir, grant_viewer),
        ({"methods": ["POST"], "status": 403}, local, remote_job_dir, GRANT_USER),
        ({"methods": ["DELETE"], "status": 403}, local, remote_job_dir, GRANT_USER),
        ({"status": 401}, remote, local_job_dir, log_in),
        (None, f"{bucket_url}/dat", local_job_dir, no_folder),
    ]
    for fault, data_dir, job_dir, message in cases:
        bucket_url.emulator.inject(*[fault] if fault else [])
        result = run_command("trainer.task", f"--data_dir={data_dir}", f"--job_dir={job_dir}")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
        assert not (tmp_path / "job").exists()
