"""One device, two devices and two workers give the same numbers. Each of the three is a process (replica_run.py), or two."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from tests.support.images import write_images
from tests.support.paths import REPLICA_RUN
from tests.support.processes import free_ports

# Relative. Half precision rounds activations to 8 or 11 bits, and replicas sum in another order.
TOLERANCE = {"float32": 1e-5, "mixed_bfloat16": 2e-2, "mixed_float16": 5e-3}
ONE_DEVICE, TWO_DEVICES, TWO_WORKERS = "one device", "two devices", "two workers"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 images of three classes, of which replica_run.py trains on 61."""
    return write_images(tmp_path_factory.mktemp("pictures"), {"a": 30, "b": 20, "c": 14})


SGD = [f"--precision={precision} --optimizer=sgd" for precision in TOLERANCE]
ADAM = "--precision=float32 --optimizer=adam"
UNEVEN = "--batch_size=7"
SINGLE_STEPS = "--steps_per_loop=1"
NO_STEPS = "--steps=0"
FROZEN, FROZEN_XLA = "--frozen=1", "--frozen=1 --xla=1"
MOBILENET, RESNET = (f"--network={name} --steps=2" for name in ("MobileNetV3Large", "ResNet50"))
# What each of the three runs, one after another in one process.
RUNS = {
    ONE_DEVICE: [*SGD, ADAM, UNEVEN, SINGLE_STEPS, NO_STEPS, FROZEN, FROZEN_XLA, MOBILENET, RESNET],
    TWO_DEVICES: [*SGD, ADAM, UNEVEN, NO_STEPS, FROZEN_XLA, MOBILENET],
    TWO_WORKERS: [*SGD, ADAM, NO_STEPS, FROZEN_XLA, RESNET],
}


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> Callable[[str, str], list[dict[str, np.ndarray]]]:
    """A function (one of RUNS, one of its runs) -> the arrays that each worker wrote, by name."""
    directory, finished = tmp_path_factory.mktemp("numbers"), {}

    def results_of(setup: str, run: str) -> list[dict[str, np.ndarray]]:
        if setup not in finished:
            finished[setup] = run_all(setup, folder, directory / setup.replace(" ", "_"))
        return finished[setup][run]

    return results_of


def run_all(setup: str, folder: pathlib.Path, output: pathlib.Path) -> dict[str, list[dict[str, np.ndarray]]]:
    num_workers = 2 if setup == TWO_WORKERS else 1
    addresses = [f"localhost:{port}" for port in free_ports(num_workers)]
    processes = []
    for index in range(num_workers):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        arguments = [part for number, run in enumerate(RUNS[setup]) for part in (f"{output}-{number}-{index}.npz", run)]
        processes.append(
            subprocess.Popen(
                [sys.executable, REPLICA_RUN, folder, "2" if setup == TWO_DEVICES else "1", *arguments],
                env={
                    **os.environ,
                    "TF_CONFIG": json.dumps(config) if num_workers > 1 else "",
                    "TF_NUM_INTRAOP_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in processes:
        text, _ = process.communicate(timeout=1600)
        assert process.returncode == 0, text
    return {
        run: [dict(np.load(f"{output}-{number}-{index}.npz")) for index in range(num_workers)]
        for number, run in enumerate(RUNS[setup])
    }


def largest_difference(one: dict, other: dict) -> float:
    """The larger of two relative differences: of the losses step by step, and of all weights as one vector.

    Not of single weights: a bias that is almost 0 after 20 steps differs by the rounding errors of its updates.
    """
    losses = [result["rows"][:, 0] for result in (one, other)]
    names = [name for name in one if name.startswith("w")]
    weights = [np.concatenate([result[name].ravel() for name in names]) for result in (one, other)]
    of_losses = np.max(np.abs(losses[0] - losses[1]) / losses[0])
    of_weights = np.linalg.norm(weights[0] - weights[1]) / np.linalg.norm(weights[0])
    return float(max(of_losses, of_weights))


@pytest.mark.parametrize("setup", [TWO_DEVICES, TWO_WORKERS])
@pytest.mark.parametrize(
    ("run", "precision"),
    # Not Adam in half precision: it divides by the size of the gradient, which leaves the rounding errors.
    [*zip(SGD, TOLERANCE, strict=True), (ADAM, "float32")],
)
def test_losses_and_weights_equal_those_of_one_device(results, setup, run, precision):
    [one] = results(ONE_DEVICE, run)
    for other in results(setup, run):
        assert other["replicas"] == 2
        assert len(one["rows"]) == len(other["rows"]) == 20
        assert largest_difference(one, other) <= TOLERANCE[precision]
        np.testing.assert_array_equal(one["rows"][:, 2], other["rows"][:, 2])  # every example counts once
        assert one["validation"][1] == other["validation"][1]


@pytest.mark.parametrize("setup", [ONE_DEVICE, TWO_DEVICES, TWO_WORKERS])
def test_xla_gives_the_numbers_of_one_device_without_xla(results, setup):
    [one] = results(ONE_DEVICE, FROZEN)
    for other in results(setup, FROZEN_XLA):
        assert largest_difference(one, other) <= TOLERANCE["float32"]


def test_both_workers_have_bit_identical_weights(results):
    chief, worker = results(TWO_WORKERS, SGD[0])
    for name in chief:
        np.testing.assert_array_equal(chief[name], worker[name])


@pytest.mark.parametrize("setup", [TWO_DEVICES, TWO_WORKERS])
def test_validation_of_equal_weights_is_bit_identical(results, setup):
    [one] = results(ONE_DEVICE, NO_STEPS)
    for other in results(setup, NO_STEPS):
        np.testing.assert_array_equal(one["validation"], other["validation"])


def test_steps_per_loop_does_not_change_the_numbers(results):
    [many], [single] = results(ONE_DEVICE, SGD[0]), results(ONE_DEVICE, SINGLE_STEPS)
    for name in many:
        np.testing.assert_array_equal(many[name], single[name])


def test_a_batch_that_replicas_cannot_share_evenly_keeps_its_size(results):
    [one], [other] = results(ONE_DEVICE, UNEVEN), results(TWO_DEVICES, UNEVEN)
    np.testing.assert_array_equal(one["rows"][:, 2], other["rows"][:, 2])


def test_another_backbone_gives_the_numbers_of_one_device(results):
    [one], [other] = results(ONE_DEVICE, MOBILENET), results(TWO_DEVICES, MOBILENET)
    assert largest_difference(one, other) <= TOLERANCE["float32"]


def test_resnet50_on_two_workers_gives_the_numbers_of_one_device(results):
    [one] = results(ONE_DEVICE, RESNET)
    for other in results(TWO_WORKERS, RESNET):
        assert largest_difference(one, other) <= TOLERANCE["float32"]
