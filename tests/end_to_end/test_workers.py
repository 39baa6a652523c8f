"""A job on two workers: real processes on loopback, as a cluster starts them."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Sequence

import numpy as np
import pytest

from tests.support import resumable_job
from tests.support.images import write_images
from tests.support.processes import free_ports
from tests.support.resumable_job import assert_same, finish, read_result, read_rows, wait_for
from trainer.artifacts.job_dir import JobDir
from trainer.runtime import rendezvous
from trainer.runtime.cluster import Cluster
from trainer.runtime.signals import StopSignal
from trainer.runtime.worker_watch import WorkerWatch

pytestmark = pytest.mark.slow

# Without its duration and the mark of the best, in the log.
EPOCH_ROW = r" \d+  (?:head|whole network) .* \(\d+ of \d+\)"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 40, "b": 30, "c": 25}, noise=90)


def start_workers(
    images: pathlib.Path,
    job_dir: pathlib.Path,
    *second_worker_flags: str,
    flags: Sequence[str] = (),
    clock_rate: float = 1,
    late_secs: float = 0,
) -> list[subprocess.Popen]:
    """Starts two workers, the chief first; both get `flags`.

    The second one starts `late_secs` later, and measures its steps with a clock that runs `clock_rate` times faster.
    """
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    workers = []
    for index in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        if index:
            environment["CLOCK_RATE"] = str(clock_rate)
            time.sleep(late_secs)
        own_flags = second_worker_flags if index else ()
        workers.append(resumable_job.start(images, job_dir, *flags, *own_flags, env=environment))
    return workers


def finish_workers(workers: list[subprocess.Popen], *, exit_code: int = 0) -> list[str]:
    """Waits for both exits; returns the rest of their outputs."""
    outputs = [finish(worker) for worker in workers]
    assert [worker.returncode for worker in workers] == [exit_code, exit_code], outputs
    return outputs


@pytest.fixture(scope="module")
def finished(images):
    """The job_dir of a finished run of two workers, and the outputs of the workers.

    By their clocks they would choose different numbers of steps per call, and wait for each other for ever.
    """
    job_dir = images.parent / "two"
    return job_dir, finish_workers(start_workers(images, job_dir, flags=["--steps_per_loop=0"], clock_rate=1000))


def test_both_workers_log_the_same_epochs_and_the_chief_writes(finished):
    job_dir, (chief, worker) = finished
    paths = JobDir(str(job_dir))
    assert "    9  whole network" in chief
    assert "report:" in chief
    assert "report:" not in worker
    assert paths.read_metrics()["workers"] == 2
    assert [path.name for path in job_dir.iterdir() if path.name.startswith(".")] == []
    assert len(os.listdir(paths.logs)) == 1
    epochs = [re.findall(EPOCH_ROW, output) for output in (chief, worker)]
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == len(read_rows(paths.history))


def test_metrics_of_the_head_equal_those_of_one_process(finished, images):
    resumable_job.run(images, images.parent / "one")
    results = [read_result(job_dir) for job_dir in (images.parent / "one", finished[0])]
    names = ["loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"]
    one, two = ([[float(row[name]) for name in names] for row in result["history"][:8]] for result in results)
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_a_fitted_head_is_that_of_one_process_on_both_workers(images, tmp_path):
    flags = [*resumable_job.FITTED_HEAD, "--epochs=2", "--test_split=0.1"]
    outputs = finish_workers(start_workers(images, tmp_path / "two", flags=flags))
    epochs = [re.findall(EPOCH_ROW, output) for output in outputs]
    assert len(epochs[0]) == 3
    assert epochs[0] == epochs[1]
    assert ["Head: logistic regression" in output for output in outputs] == [True, False]  # the chief fits it for both
    assert ["Labels: for" in output for output in outputs] == [True, False]  # and judges the labels alone
    resumable_job.run(images, tmp_path / "one", *flags)
    one, two = (read_rows(JobDir(str(tmp_path / name)).history) for name in ("one", "two"))
    for name in ("loss", "val_loss"):
        values = [[float(row[name]) for row in rows] for rows in (one, two)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-4, err_msg=name)
    tests = [JobDir(str(tmp_path / name)).read_metrics()["test"] for name in ("one", "two")]
    assert [test["images"] for test in tests] == [9, 9]
    assert ["test accuracy" in output for output in outputs] == [True, False]


def test_a_signal_to_one_worker_stops_both_and_they_resume(finished, images, tmp_path):
    workers = start_workers(images, tmp_path / "job")
    wait_for(workers[1], "   12  whole network")
    workers[1].send_signal(signal.SIGTERM)
    finish_workers(workers, exit_code=143)
    outputs = finish_workers(start_workers(images, tmp_path / "job"))
    assert "Resuming from the checkpoint" in outputs[0]
    assert_same(read_result(finished[0]), read_result(tmp_path / "job"))


def test_workers_resume_after_one_was_killed_or_stopped(finished, images, tmp_path):
    chief, worker = start_workers(images, tmp_path / "job")
    wait_for(chief, "   10  whole network")
    chief.kill()
    assert_loses(worker, "worker 0")
    finish(chief)
    chief, worker = start_workers(images, tmp_path / "job", late_secs=10)
    wait_for(chief, "   12  whole network")
    worker.send_signal(signal.SIGSTOP)
    assert_loses(chief, "worker 1")
    worker.send_signal(signal.SIGCONT)
    assert_loses(worker, "worker 0")
    finish_workers(start_workers(images, tmp_path / "job"))
    assert_same(read_result(finished[0]), read_result(tmp_path / "job"))


def assert_loses(process: subprocess.Popen, lost: str) -> None:
    """Asserts that the worker exits within a minute, and names the lost one and what to do."""
    started = time.monotonic()
    output = finish(process)
    assert time.monotonic() - started < 60
    assert process.returncode == 75, output
    assert re.search(rf"{lost} \(localhost:\d+\) does not answer. To do: .* start all workers again", output), output


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_is_killed_before_tensorflow_starts_ends_the_other(images, tmp_path, index):
    addresses = tuple(f"localhost:{port}" for port in free_ports(2))
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
    worker = resumable_job.start(images, tmp_path / "job", "--worker_timeout_secs=10", env=environment)
    killed = Cluster(workers=2, index=1 - index, is_chief=index == 1, addresses=addresses, source="test")
    nothing = WorkerWatch(killed, timeout_secs=600, stop=StopSignal(exit_code=0), on_timeout=print, on_stop=print)
    rendezvous.wait_for_workers(killed, nothing)
    assert_loses(worker, f"worker {1 - index}")


def test_a_worker_with_other_flags_is_an_error_before_training(images, tmp_path):
    outputs = finish_workers(start_workers(images, tmp_path / "job", "--seed=5"), exit_code=2)
    for output in outputs:
        assert "Worker 1 has other flags" in output
        assert "Traceback" not in output
    assert not os.path.exists(JobDir(str(tmp_path / "job")).history)


def test_a_run_of_two_workers_resumes_as_one_process(images, finished, tmp_path):
    workers = start_workers(images, tmp_path / "job")
    wait_for(workers[0], "   12  whole network")
    workers[0].send_signal(signal.SIGTERM)
    finish_workers(workers, exit_code=143)
    resumable_job.run(images, tmp_path / "job")
    results = [read_result(job_dir) for job_dir in (finished[0], tmp_path / "job")]
    two, mixed = ([float(row["loss"]) for row in result["history"][:14]] for result in results)
    np.testing.assert_allclose(two, mixed, rtol=2e-3)
