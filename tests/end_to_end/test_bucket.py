"""A job in a bucket, through missing rights, outages and faults, ends like the same job on a disk."""

import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from tests.support.bucket import DENIED, FAULTS, upload
from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from tests.support.processes import run_command
from trainer.artifacts.job_dir import PAGE_NAME, JobDir
from trainer.storage import files, gcs, lock

FLAGS = [
    "--weights=none",
    "--head_epochs=0",
    "--epochs=5",
    "--image_size=32",
    "--batch_size=16",
    "--precision=float32",
    "--learning_rate=0.01",
    "--max_bad_fraction=0.1",
    "--cache=none",
]


def start_job(data_dir: str, job_dir: str, *, storage_timeout_secs: int = 300) -> subprocess.Popen:
    paths = [f"--data_dir={data_dir}", f"--job_dir={job_dir}", f"--storage_timeout_secs={storage_timeout_secs}"]
    return subprocess.Popen(
        [sys.executable, TINY_JOB, *paths, *FLAGS], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(job: subprocess.Popen) -> str:
    output, errors = job.communicate(timeout=800)
    assert job.returncode == 0, errors
    return output


def result_of(paths: JobDir) -> dict:
    """What must not depend on where a run is stored: no times, no paths."""
    rows = [line.split(",")[:-2] for line in files.read(paths.history).decode().splitlines()]
    metrics = paths.read_metrics()
    return {
        "history": rows,
        "metrics": {
            name: metrics[name] for name in ("val_accuracy", "val_loss", "best_epoch", "per_class", "bad_images")
        },
        "files": [files.read(path) for path in (paths.split, paths.labels, paths.predictions, paths.bad_files)],
    }


def weights_of(paths: JobDir) -> dict[str, np.ndarray]:
    weights = {}
    with files.local_copy(paths.best_weights) as path, h5py.File(path) as file:
        file.visititems(lambda name, item: weights.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    data = write_images(tmp_path_factory.mktemp("pictures"), {"cat": 40, "dog": 40}, noise=60)
    (data / "cat" / "cut.jpg").write_bytes((data / "cat" / "cat_000.jpg").read_bytes()[:-30])
    return data


@pytest.fixture(scope="module")
def local_run(images, tmp_path_factory):
    job_dir = str(tmp_path_factory.mktemp("local") / "job")
    finish(start_job(str(images), job_dir))
    return JobDir(job_dir)


@pytest.mark.slow
def test_a_job_in_a_bucket_survives_faults_and_ends_as_on_a_disk(images, local_run, bucket_url):
    data, paths = upload(images, f"{bucket_url}/data"), JobDir(f"{bucket_url}/job")
    one_in_ten = [{**fault, "share": 0.02} for fault in FAULTS]
    for fault, exit_code, message in (
        ({"status": 403, "message": DENIED}, 2, "it resumes from the last complete checkpoint"),
        ({"status": 503}, 75, "unavailable for 2 s"),
    ):
        history = files.read(paths.history)
        job = start_job(data, paths.root, storage_timeout_secs=2)
        wait_for_an_epoch(job, paths, history)
        bucket_url.emulator.inject(fault)
        errors = job.communicate(timeout=800)[1]
        bucket_url.emulator.inject()
        assert job.returncode == exit_code, errors
        assert message in errors
        assert "Traceback" not in errors
        files.remove(files.join(paths.checkpoints, lock.LOCK_NAME))  # it expires in a minute; test_lock.py waits for it
    bucket_url.emulator.inject(*one_in_ten)
    job = start_job(data, paths.root)
    wait_for_an_epoch(job, paths, files.read(paths.history))
    assert [name for name in files.list_names(paths.logs) if "tfevents" in name]
    bucket_url.emulator.inject({"status": 503, "seconds": 60}, *one_in_ten)
    finish(job)
    bucket_url.emulator.inject()
    assert result_of(paths) == result_of(local_run)
    assert paths.read_metrics()["storage_retries"] > 5
    assert [name for name in gcs.list_tree(paths.root) if ".probe" in name or lock.LOCK_NAME in name] == []
    weights, expected = weights_of(paths), weights_of(local_run)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    check_other_commands(data, paths, bucket_url)


def wait_for_an_epoch(job: subprocess.Popen, paths: JobDir, history: bytes | None) -> None:
    """Waits until history.csv, which can be read while the job runs, differs from `history`."""
    while files.read(paths.history) == history:
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.1)


def check_other_commands(data: str, paths: JobDir, url: str) -> None:
    """predict, evaluate, report and inspect_data with gs:// paths alone."""
    evaluation = JobDir(f"{url}/evaluation")
    commands = [
        ["trainer.predict", f"--model_dir={paths.saved_model}", f"--output={url}/labels.csv", f"{data}/cat"],
        [
            "trainer.evaluate",
            f"--model_dir={paths.saved_model}",
            f"--data_dir={data}",
            f"--report_dir={evaluation.root}",
            "--max_bad_fraction=0.1",
        ],
        ["trainer.report", f"--job_dir={paths.root}"],
        ["trainer.inspect_data", f"--data_dir={data}", f"--output_dir={url}/inspection", f"--fix={url}/list.txt"],
    ]
    started = [
        subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    for command in started:
        finish(command)
    assert len(files.read(f"{url}/labels.csv").decode().splitlines()) == 1 + 41
    assert evaluation.read_metrics()["validation_images"] == 80
    for page in (f"{evaluation.root}/{PAGE_NAME}", paths.report_page, f"{url}/inspection/inspect.html"):
        assert files.read(page).startswith(b"<!")
    assert files.read(f"{url}/list.txt").decode() == f"{data}/cat/cut.jpg\n"


@pytest.mark.slow
def test_shards_in_a_bucket_train_as_the_folder_does(images, local_run, bucket_url):
    packed, data = f"{bucket_url}/packed", upload(images, f"{bucket_url}/data")
    packing = run_command("trainer.pack", f"--data_dir={data}", f"--output_dir={packed}", "--max_bad_fraction=0.1")
    assert packing.returncode == 0, packing.stderr
    paths = JobDir(f"{bucket_url}/job")
    finish(start_job(packed, paths.root))
    assert result_of(paths) == result_of(local_run)
