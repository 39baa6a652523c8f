"""A job that is signaled, damaged or out of disk space resumes as if it had not been interrupted.

test_kills.py kills jobs.
"""

import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support import resumable_job
from tests.support.images import write_images
from tests.support.resumable_job import (
    assert_same,
    finish,
    newest_checkpoint,
    read_result,
    read_rows,
    run,
    start,
    wait_for,
)
from trainer.artifacts.job_dir import JobDir

pytestmark = pytest.mark.slow

ENDLESS = ("--epochs=500", "--early_stopping_patience=0")
MEASURED_SECONDS = ("input_wait_seconds", "compute_seconds", "validation_seconds")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 40, "b": 30, "c": 25}, noise=90)


@pytest.fixture(scope="module")
def uninterrupted(images):
    """The result of a run without interruption."""
    job_dir = images.parent / "uninterrupted"
    run(images, job_dir)
    return read_result(job_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_next_start_resumes(images, uninterrupted, tmp_path, number):
    job_dir = tmp_path / "job"
    process = start(images, job_dir)
    wait_for(process, "   10  whole network")
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == 143, output
    assert "saving, then exiting" in output
    assert "The same command resumes the run" in output
    assert JobDir(str(job_dir)).read_metrics() is None
    output = run(images, job_dir)
    assert "Resuming from the checkpoint after epoch 1" in output
    assert "    1  head" not in output
    assert_same(uninterrupted, read_result(job_dir))


def test_a_damaged_checkpoint_costs_one_epoch_and_changes_nothing(images, uninterrupted, tmp_path):
    process = start(images, tmp_path / "job")
    wait_for(process, "   12  whole network")
    process.kill()
    finish(process)
    newest = newest_checkpoint(tmp_path / "job")
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert f"{newest} is damaged" in run(images, tmp_path / "job")
    assert_same(uninterrupted, read_result(tmp_path / "job"))


def test_a_finished_run_continues_with_more_epochs(images, tmp_path):
    flags, job_dir = ["--lr_schedule=constant", "--early_stopping_patience=0"], tmp_path / "job"
    paths = JobDir(str(job_dir))
    assert "   10  whole network" in run(images, job_dir, *flags, "--epochs=2", "--profile_steps=2,4")
    [profile] = pathlib.Path(paths.logs).rglob("*.xplane.pb")
    assert profile.stat().st_size > 10_000
    first_times = read_rows(paths.time)
    assert [row["stage"] for row in first_times] == ["head"] * 8 + ["all"] * 2
    output = run(images, job_dir, *flags, "--epochs=4")
    assert "   12  whole network" in output
    assert "   10  whole network" not in output
    times, history = read_rows(paths.time), read_rows(paths.history)
    assert [row["epoch"] for row in times] == [str(number) for number in range(1, 13)]
    for before, after in zip(first_times, times, strict=False):
        assert [before[name] for name in MEASURED_SECONDS] == [after[name] for name in MEASURED_SECONDS]
    check_times(times, history)
    run(images, tmp_path / "at once", *flags, "--epochs=4")
    assert_same(read_result(tmp_path / "at once"), read_result(job_dir))


def test_a_fitted_head_killed_at_each_of_its_steps_changes_nothing(images, tmp_path):
    flags, job_dir = [*resumable_job.FITTED_HEAD, "--epochs=3"], tmp_path / "job"
    steps = ["Features of", "Head: logistic regression", "flipped left to right"]
    for step in steps:
        process = start(images, job_dir, *flags)
        wait_for(process, step)
        process.kill()
        process.wait()
    run(images, job_dir, *flags)
    run(images, tmp_path / "undisturbed", *flags)
    assert_same(read_result(tmp_path / "undisturbed"), read_result(job_dir))
    assert [row["stage"] for row in read_rows(JobDir(str(job_dir)).history)] == ["head", "all", "all", "all"]


def check_times(times: list[dict[str, str]], history: list[dict[str, str]]) -> None:
    for row, epoch in zip(times, history, strict=True):
        seconds = {name: float(row[name]) for name in MEASURED_SECONDS}
        assert min(seconds.values()) > 0, row
        steps_seconds = seconds["input_wait_seconds"] + seconds["compute_seconds"]
        assert steps_seconds == pytest.approx(float(epoch["seconds"]), abs=0.002)
        assert float(row["ceiling_images_per_second"]) > float(row["images_per_second"]) * 0.999


# Each step subtracts 3.5 times the weights from the weights, until they overflow; at half the learning rate 1.75 times.
DIVERGING = ("--weights=none", "--head_epochs=0", "--epochs=6", "--optimizer=sgd", "--weight_decay=3.5e6",
             "--warmup_epochs=0", "--learning_rate=1e-6", "--lr_schedule=constant", "--early_stopping_patience=0")  # fmt: skip


def test_a_loss_that_is_not_finite_is_an_error_without_retries(images, tmp_path):
    process = start(images, tmp_path / "job", *DIVERGING, "--nan_retries=0")
    output = finish(process)
    assert process.returncode == 2, output
    assert re.search(r"error: Stage all, epoch [34], step \d+: the loss is (nan|inf)", output), output
    assert "Images of that step: '" in output
    assert "The last checkpoint is kept" in output
    assert "Traceback" not in output


def test_a_loss_that_is_not_finite_halves_the_learning_rate(images, tmp_path):
    output = run(images, tmp_path / "job", *DIVERGING)
    assert "Restoring the last checkpoint with half the learning rate" in output
    history = read_rows(JobDir(str(tmp_path / "job")).history)
    losses, rates = ([float(row[name]) for row in history] for name in ("loss", "learning_rate"))
    assert len(history) == 6
    assert set(np.float32(rates)) == {np.float32(1e-6), np.float32(5e-7)}
    assert rates[-1] == rates[-2] == pytest.approx(5e-7)
    assert losses[-1] < losses[-2]


def test_a_job_dir_that_disappears_is_a_one_line_error(images, tmp_path):
    job_dir, moved = tmp_path / "job", tmp_path / "moved"
    process = start(images, job_dir, *ENDLESS)
    wait_for(process, "   10  whole network")
    job_dir.rename(moved)
    output = finish(process)
    assert process.returncode == 2, output
    assert "start the same command again" in output
    assert not job_dir.exists()
    moved.rename(job_dir)
    process = start(images, job_dir, *ENDLESS)
    wait_for(process, "Resuming from the checkpoint")
    process.kill()
    finish(process)


def test_resnet50_with_adam_is_saved_within_15_seconds_of_sigterm(tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 60, "b": 60})
    flags = [f"--data_dir={images}", f"--job_dir={tmp_path / 'job'}", "--weights=none", "--head_epochs=0", "--epochs=50",
             "--image_size=64", "--batch_size=8", "--precision=float32", "--checkpoint_secs=3000"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.task", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(process, "    1  whole network")
    time.sleep(1)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    seconds = time.monotonic() - started
    assert process.returncode == 143, output
    assert newest_checkpoint(tmp_path / "job").stat().st_size > 3 * 90e6  # the weights and the two moments of Adam
    assert seconds < 15


def test_on_a_full_disk_the_last_checkpoint_is_kept(images, tmp_path):
    process = start(images, tmp_path / "job", *ENDLESS)
    wait_for(process, "   10  whole network")
    process.kill()
    finish(process)
    newest = newest_checkpoint(tmp_path / "job")
    contents = newest.read_bytes()
    (newest.parent / ".1-2-000099.npz").write_bytes(b"partial")  # as a job that is killed while it writes leaves it
    limit = len(contents) // 2  # largest size of a file in bytes: writing fails halfway, as on a full disk
    process = start(
        images, tmp_path / "job", *ENDLESS, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    output = finish(process)
    assert process.returncode == 2, output
    assert "File too large" in output
    assert newest.read_bytes() == contents
    assert not [path.name for path in newest.parent.iterdir() if path.name.startswith(".")]
