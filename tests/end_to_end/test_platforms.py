"""A job of two hosts in the environment of each platform: each host is lost once, comes back elsewhere, and is found again.

The hosts are network namespaces: both have the port of the platform, and a host that comes back has another address, as a
pod that is scheduled again.
"""

import json
import os
import pathlib
import re
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.support import hosts, resumable_job
from tests.support.hosts import Hosts
from tests.support.images import write_images
from tests.support.resumable_job import assert_same, finish, read_result, wait_for

pytestmark = pytest.mark.slow

FLAGS = [
    "--head_epochs=40",
    "--epochs=0",
    "--early_stopping_patience=0",
]  # each host is lost in one of the first epochs
MAX_SECS = 60.0  # until the other host has ended, and until both are at work again; an idle machine takes 15


class Platform(NamedTuple):
    """The names of its two hosts, the chief first, and the environment of each."""

    names: tuple[str, str]
    environment: Callable[[int], dict[str, str]]


def vertex(index: int) -> dict[str, str]:
    cluster = {"chief": ["training-workerpool0-ab-0:2222"], "worker": ["training-workerpool1-ab-0:2222"]}
    task = {"type": ("chief", "worker")[index], "index": 0, "cloud": "id"}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task, "environment": "cloud"})}


def vertex_pools(index: int) -> dict[str, str]:
    cluster = {f"workerpool{i}": [f"cmle-training-workerpool{i}-ab-0:2222"] for i in range(2)}
    task = {"type": f"workerpool{index}", "index": 0, "trial": ""}
    return {"CLUSTER_SPEC": json.dumps({"cluster": cluster, "task": task, "environment": "cloud"})}


def indexed_job(index: int) -> dict[str, str]:
    names = {"TRAINER_HOSTS": "2", "TRAINER_JOB": "cats", "TRAINER_SERVICE": "cats-hosts"}
    return {**names, "JOB_COMPLETION_INDEX": str(index)}


def jobset(index: int) -> dict[str, str]:
    names = {"TRAINER_HOSTS": "2", "JOBSET_NAME": "cats", "REPLICATED_JOB_NAME": "workers", "JOB_INDEX": "0"}
    return {**names, "JOB_COMPLETION_INDEX": str(index)}


def trainjob(index: int) -> dict[str, str]:
    return {"TRAINER_HOSTS": "2", "TRAINJOB_NAME": "cats", "JOB_COMPLETION_INDEX": str(index)}


def slurm(index: int) -> dict[str, str]:
    step = {"SLURM_STEP_NODELIST": "gpu[09-10]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    job = {"SLURM_JOB_ID": "20117", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[07-10]"}
    task = {"SLURM_NODEID": str(index), "SLURM_PROCID": str(index), "SLURMD_NODENAME": ("gpu09", "gpu10")[index]}
    return {**job, **step, **task}


PLATFORMS = {
    "Vertex AI, TF_CONFIG": Platform(("training-workerpool0-ab-0", "training-workerpool1-ab-0"), vertex),
    "Vertex AI, CLUSTER_SPEC": Platform(
        ("cmle-training-workerpool0-ab-0", "cmle-training-workerpool1-ab-0"), vertex_pools
    ),
    "Indexed Job": Platform(("cats-0.cats-hosts", "cats-1.cats-hosts"), indexed_job),
    "JobSet": Platform(("cats-workers-0-0.cats", "cats-workers-0-1.cats"), jobset),
    "TrainJob": Platform(("cats-node-0-0.cats", "cats-node-0-1.cats"), trainjob),
    "Slurm": Platform(("gpu09", "gpu10"), slurm),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    if reason := hosts.reason_against():
        pytest.skip(reason)
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 40, "b": 30, "c": 25}, noise=90)


def start(network: Hosts, platform: Platform, images: pathlib.Path, job_dir: pathlib.Path) -> list[subprocess.Popen]:
    return [
        resumable_job.start(
            images,
            job_dir,
            *FLAGS,
            prefix=network.command(index),
            env={**os.environ, **platform.environment(index)},
        )
        for index in range(2)
    ]


def finish_both(workers: list[subprocess.Popen]) -> None:
    outputs = [finish(worker) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs


@pytest.fixture(scope="module")
def undisturbed(images):
    """What a run of two hosts leaves that loses none."""
    platform = PLATFORMS["Indexed Job"]
    with Hosts(platform.names) as network:
        finish_both(start(network, platform, images, images.parent / "undisturbed"))
    return read_result(images.parent / "undisturbed")


@pytest.mark.parametrize("name", PLATFORMS)
def test_each_host_is_lost_once_and_found_at_its_new_address(name, images, undisturbed, tmp_path):
    platform = PLATFORMS[name]
    with Hosts(platform.names) as network:
        for lost in range(2):
            started = time.monotonic()
            workers = start(network, platform, images, tmp_path / "job")
            wait_for(workers[0], f"    {3 + lost}  head")
            assert time.monotonic() - started < MAX_SECS
            workers[lost].kill()
            finish(workers[lost])
            killed = time.monotonic()
            other = workers[1 - lost]
            output = finish(other)
            assert time.monotonic() - killed < MAX_SECS
            assert other.returncode == 75, output
            assert re.search(rf"worker {lost} \({re.escape(platform.names[lost])}:\d+\) does not answer", output), (
                output
            )
            network.move(lost)
        finish_both(start(network, platform, images, tmp_path / "job"))
    assert_same(read_result(tmp_path / "job"), undisturbed)
