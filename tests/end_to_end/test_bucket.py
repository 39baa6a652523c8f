"""The job end to end in a bucket, through all that can go wrong there, is the job on a disk."""

import hashlib
import subprocess
import sys
import time

import pytest

from tests.storage.test_gcs import DENIED, FAULTS, quick, upload  # noqa: F401
from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from tests.support.processes import run_command
from trainer.storage import files, gcs

RECIPE = ("--weights=none", "--head_epochs=0", "--epochs=5", "--image_size=32", "--batch_size=16", "--precision=float32",
          "--learning_rate=0.01")  # fmt: skip


def start_job(data_dir: str, job_dir: str, *more: str, patience: int = 300) -> subprocess.Popen:
    arguments = [f"--data_dir={data_dir}", f"--job_dir={job_dir}", f"--storage_timeout_secs={patience}", *RECIPE, *more]
    return subprocess.Popen(
        [sys.executable, TINY_JOB, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(job: subprocess.Popen) -> str:
    output, errors = job.communicate(timeout=800)
    assert job.returncode == 0, errors
    return output


def files_of_run(root: str) -> dict[str, bytes]:
    """What must be the same wherever a run lies: without times, paths and the order of zip entries."""
    rows = [line.split(",")[:-2] for line in files.read(f"{root}/history.csv").decode().splitlines()]
    metrics = files.read_json(f"{root}/metrics.json")
    best = {name: metrics[name] for name in ("val_accuracy", "val_loss", "best_epoch", "per_class", "bad_images")}
    names = ("split.csv", "labels.txt", "predictions.csv", "bad_files.csv")
    return {"history": rows, "metrics": best, **{name: files.read(f"{root}/{name}") for name in names}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    data = write_images(tmp_path_factory.mktemp("pictures"), {"cat": 40, "dog": 40}, noise=60)
    (data / "cat" / "cut.jpg").write_bytes((data / "cat" / "cat_000.jpg").read_bytes()[:-30])
    return data


@pytest.fixture(scope="module")
def local_run(images, tmp_path_factory):
    job_dir = tmp_path_factory.mktemp("local") / "job"
    finish(start_job(str(images), str(job_dir), "--max_bad_fraction=0.1", "--cache=none"))
    return job_dir


@pytest.mark.slow
def test_a_job_in_a_bucket_goes_through_withdrawn_rights_outages_and_faults_and_is_the_job_on_a_disk(
    images, local_run, bucket_url
):
    data, root = upload(images, f"{bucket_url}/data"), f"{bucket_url}/job"
    one_in_ten = [{**fault, "share": 0.02} for fault in FAULTS]
    for fault, code, said in (
        ({"status": 403, "message": DENIED}, 2, "start the same command again; it goes on from the last complete save"),
        ({"status": 503}, 75, "no answer for 2 s"),
    ):
        before = files.read(f"{root}/history.csv")
        job = start_job(data, root, "--max_bad_fraction=0.1", "--cache=none", patience=2)
        wait_for_an_epoch(job, root, before)
        bucket_url.emulator.plant(fault)
        errors = job.communicate(timeout=800)[1]
        bucket_url.emulator.plant()
        assert job.returncode == code, errors
        assert said in errors
        assert "Traceback" not in errors
        files.remove(f"{root}/checkpoints/lease.json")  # it runs out in a minute; tested above
    bucket_url.emulator.plant(*one_in_ten)
    job = start_job(data, root, "--max_bad_fraction=0.1", "--cache=none")
    wait_for_an_epoch(job, root, files.read(f"{root}/history.csv"))
    assert [name for name in files.list_names(f"{root}/logs") if "tfevents" in name]
    bucket_url.emulator.plant({"status": 503, "seconds": 60}, *one_in_ten)
    finish(job)
    bucket_url.emulator.plant()
    assert files_of_run(root) == files_of_run(str(local_run))
    assert files.read_json(f"{root}/metrics.json")["storage_retries"] > 5
    assert [name for name in gcs.list_tree(root) if ".probe" in name or "lease" in name] == []
    with files.local_copy(f"{root}/best.weights.h5") as copy:
        assert weights_of(copy) == weights_of(str(local_run / "best.weights.h5"))
    check_other_commands(data, root, bucket_url)


def wait_for_an_epoch(job: subprocess.Popen, root: str, before: bytes | None) -> None:
    """Until history.csv, which others read while the job runs, is another than before."""
    while files.read(f"{root}/history.csv") == before:
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.1)


def weights_of(path: str) -> dict[str, str]:
    import h5py

    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: hashlib.md5(item[()].tobytes()).hexdigest()})
                        if isinstance(item, h5py.Dataset) else None)  # fmt: skip
    return found


def check_other_commands(data: str, root: str, url: str) -> None:
    """predict, evaluate, report, inspect_data: everything gs://, the same answers as on a disk."""
    commands = [
        ("trainer.predict", f"--model_dir={root}/saved_model", f"--output={url}/labels.csv", f"{data}/cat"),
        ("trainer.evaluate", f"--model_dir={root}/saved_model", f"--data_dir={data}", f"--report_dir={url}/judged",
         "--max_bad_fraction=0.1"),
        ("trainer.report", f"--job_dir={root}"),
        ("trainer.inspect_data", f"--data_dir={data}", f"--output_dir={url}/inspection", f"--fix={url}/list.txt"),
    ]  # fmt: skip
    started = [
        subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    for command in started:
        finish(command)
    labels = files.read(f"{url}/labels.csv").decode().splitlines()
    assert len(labels) == 1 + 41
    assert files.read_json(f"{url}/judged/metrics.json")["validation_images"] == 80
    for page in (f"{url}/judged/index.html", f"{root}/report/index.html", f"{url}/inspection/inspect.html"):
        assert files.read(page).startswith(b"<!")
    assert files.read(f"{url}/list.txt").decode() == f"{data}/cat/cut.jpg\n"


@pytest.mark.slow
def test_shards_in_a_bucket_train_as_the_folder_does(images, local_run, bucket_url):
    packed, data = f"{bucket_url}/packed", upload(images, f"{bucket_url}/data")
    packing = run_command("trainer.pack", f"--data_dir={data}", f"--output_dir={packed}", "--max_bad_fraction=0.1")
    assert packing.returncode == 0, packing.stderr
    finish(start_job(packed, f"{bucket_url}/job", "--max_bad_fraction=0.1", "--cache=none"))
    assert files_of_run(f"{bucket_url}/job") == files_of_run(str(local_run))
