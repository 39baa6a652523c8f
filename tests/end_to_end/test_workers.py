"""The whole job on two workers: real processes on loopback, as a cluster would start them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.end_to_end.test_resume import FLAGS, SCRIPT, assert_same, finish, wait_for, what_is_left
from tests.support.images import write_images
from tests.support.processes import free_ports

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 40, "b": 30, "c": 25}, noise=90)


def start(images, job_dir, *more, of_worker=None) -> list[subprocess.Popen]:
    """Two workers; `of_worker` gives the second one further flags."""
    weights = images.parent / "given.weights.h5"
    weights.write_bytes(b"")
    flags = [flag.replace("=given", f"={weights}") for flag in FLAGS]
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, f"--data_dir={images}", f"--job_dir={job_dir}", *flags, *more]
            + (of_worker or [] if index else []),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}),
            },
        )
        for index in range(2)
    ]


def finish_both(processes) -> list[str]:
    return [finish(process) for process in processes]


@pytest.fixture(scope="module")
def finished(images):
    job_dir = images.parent / "two"
    processes = start(images, job_dir)
    texts = finish_both(processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    return job_dir, texts


def test_two_workers_train_as_one_and_only_the_chief_writes(finished, images):
    job_dir, (chief, worker) = finished
    alone = images.parent / "one"
    [one, other] = start(images, alone, "--epochs=3")[:2]
    finish_both([one, other])
    history = (job_dir / "history.csv").read_text().splitlines()
    assert "epoch 9 (all)" in chief
    assert "epoch 9 (all)" in worker  # each worker tells its own progress
    assert "report:" in chief
    assert "report:" not in worker
    assert json.loads((job_dir / "metrics.json").read_text())["workers"] == 2
    assert [path.name for path in job_dir.iterdir() if path.name.startswith(".")] == []
    assert len(list((job_dir / "logs").iterdir())) == 1
    figures = [re.findall(r"epoch \d+ \(\w+\): loss .* val_accuracy [\d.]+", text) for text in (chief, worker)]
    assert figures[0] == figures[1]  # the same losses and the same end, early or not
    assert len(history) == len(figures[0]) + 1


def test_the_numbers_are_those_of_one_process(finished, images):
    job_dir, _ = finished
    process = subprocess.run(
        [sys.executable, SCRIPT, f"--data_dir={images}", f"--job_dir={images.parent / 'alone'}"]
        + [flag.replace("=given", f"={images.parent / 'given.weights.h5'}") for flag in FLAGS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    two, one = what_is_left(job_dir), what_is_left(images.parent / "alone")
    heads = [[[float(v) for v in row[2:7]] for row in each["history"][1:9]] for each in (one, two)]
    np.testing.assert_allclose(*heads, rtol=1e-4)


def test_a_signal_to_one_worker_stops_both_and_both_go_on_as_if_nothing_had_happened(finished, images, tmp_path):
    processes = start(images, tmp_path / "job")
    wait_for(processes[1], "epoch 12 (all)")
    processes[1].send_signal(signal.SIGTERM)
    texts = finish_both(processes)
    assert [process.returncode for process in processes] == [143, 143], texts
    processes = start(images, tmp_path / "job")
    texts = finish_both(processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "Going on from the save" in texts[0]
    assert_same(what_is_left(finished[0]), what_is_left(tmp_path / "job"))


def test_when_one_worker_is_killed_the_other_ends_within_a_minute_and_both_can_go_on(finished, images, tmp_path):
    processes = start(images, tmp_path / "job")
    wait_for(processes[0], "epoch 12 (all)")
    processes[1].kill()
    killed = time.monotonic()
    text = finish(processes[0])
    assert time.monotonic() - killed < 60
    assert processes[0].returncode == 75, text
    assert "Another worker ended or cannot be reached" in text
    finish(processes[1])
    processes = start(images, tmp_path / "job")
    texts = finish_both(processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    assert_same(what_is_left(finished[0]), what_is_left(tmp_path / "job"))


def test_a_worker_with_other_flags_is_found_before_anything_is_trained(images, tmp_path):
    processes = start(images, tmp_path / "job", of_worker=["--seed=5"])
    texts = finish_both(processes)
    assert [process.returncode for process in processes] == [2, 2], texts
    for text in texts:
        assert "Worker 1 has other flags" in text
        assert "Traceback" not in text
    assert not (tmp_path / "job" / "history.csv").exists()


def test_a_run_of_two_workers_goes_on_as_one_process(images, finished, tmp_path):
    processes = start(images, tmp_path / "job")
    wait_for(processes[0], "epoch 12 (all)")
    processes[0].send_signal(signal.SIGTERM)
    texts = finish_both(processes)
    assert [process.returncode for process in processes] == [143, 143], texts
    alone = subprocess.run(
        [sys.executable, SCRIPT, f"--data_dir={images}", f"--job_dir={tmp_path / 'job'}"]
        + [flag.replace("=given", f"={images.parent / 'given.weights.h5'}") for flag in FLAGS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    two, mixed = what_is_left(finished[0]), what_is_left(tmp_path / "job")
    losses = [[float(row[2]) for row in each["history"][1:15]] for each in (two, mixed)]
    np.testing.assert_allclose(*losses, rtol=2e-3)
