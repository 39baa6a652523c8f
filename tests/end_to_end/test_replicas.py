"""One device, two devices and two workers give the same numbers. Each run is a process of its own (replica_run.py)."""

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


@pytest.fixture(scope="module")
def run_once(folder, tmp_path_factory) -> Callable[..., list[dict[str, np.ndarray]]]:
    """A function (setup, **options) -> the arrays that each worker wrote, by name. Equal calls run once."""
    outputs, results = tmp_path_factory.mktemp("numbers"), {}

    def call(setup: str, **options) -> list[dict[str, np.ndarray]]:
        key = (setup, *sorted(options.items()))
        if key not in results:
            results[key] = run(setup, options, folder, outputs / str(len(results)))
        return results[key]

    return call


def run(setup: str, options: dict, folder: pathlib.Path, output: pathlib.Path) -> list[dict[str, np.ndarray]]:
    num_workers = 2 if setup == TWO_WORKERS else 1
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments.append(f"--devices={2 if setup == TWO_DEVICES else 1}")
    addresses = [f"localhost:{port}" for port in free_ports(num_workers)]
    processes = []
    for index in range(num_workers):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        tf_config = json.dumps(config) if num_workers > 1 else ""
        processes.append(
            subprocess.Popen(
                [sys.executable, REPLICA_RUN, folder, f"{output}-{index}.npz", *arguments],
                env={**os.environ, "TF_CONFIG": tf_config, "TF_NUM_INTRAOP_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in processes:
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
    return [dict(np.load(f"{output}-{index}.npz")) for index in range(num_workers)]


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


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("setup", [TWO_DEVICES, TWO_WORKERS])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_losses_and_weights_equal_those_of_one_device(run_once, setup, precision, optimizer):
    if optimizer == "adam" and precision != "float32":
        pytest.skip("Adam divides by the size of the gradient, which leaves the rounding errors of half precision")
    options = {"precision": precision, "optimizer": optimizer}
    [one] = run_once(ONE_DEVICE, **options)
    for other in run_once(setup, **options):
        assert other["replicas"] == 2
        assert len(one["rows"]) == len(other["rows"]) == 20
        assert largest_difference(one, other) <= TOLERANCE[precision]
        np.testing.assert_array_equal(one["rows"][:, 2], other["rows"][:, 2])  # every example counts once
        assert one["validation"][1] == other["validation"][1]


@pytest.mark.parametrize("setup", [ONE_DEVICE, TWO_DEVICES, TWO_WORKERS])
def test_xla_gives_the_numbers_of_one_device_without_xla(run_once, setup):
    [one] = run_once(ONE_DEVICE, frozen=1)
    for other in run_once(setup, frozen=1, xla=1):
        assert largest_difference(one, other) <= TOLERANCE["float32"]


def test_both_workers_have_bit_identical_weights(run_once):
    chief, worker = run_once(TWO_WORKERS, precision="float32", optimizer="sgd")
    for name in chief:
        np.testing.assert_array_equal(chief[name], worker[name])


@pytest.mark.parametrize("setup", [TWO_DEVICES, TWO_WORKERS])
def test_validation_of_equal_weights_is_bit_identical(run_once, setup):
    [one] = run_once(ONE_DEVICE, steps=0)
    for other in run_once(setup, steps=0):
        np.testing.assert_array_equal(one["validation"], other["validation"])


def test_steps_per_loop_does_not_change_the_numbers(run_once):
    [many] = run_once(ONE_DEVICE, precision="float32", optimizer="sgd")
    [single] = run_once(ONE_DEVICE, precision="float32", optimizer="sgd", steps_per_loop=1)
    for name in many:
        np.testing.assert_array_equal(many[name], single[name])


def test_a_batch_that_replicas_cannot_share_evenly_keeps_its_size(run_once):
    [one] = run_once(ONE_DEVICE, precision="float32", optimizer="sgd", batch_size=7)
    [other] = run_once(TWO_DEVICES, precision="float32", optimizer="sgd", batch_size=7)
    np.testing.assert_array_equal(one["rows"][:, 2], other["rows"][:, 2])


def test_another_backbone_gives_the_numbers_of_one_device(run_once):
    options = {"network": "MobileNetV3Large", "steps": 2, "optimizer": "sgd"}
    [one] = run_once(ONE_DEVICE, **options)
    [other] = run_once(TWO_DEVICES, **options)
    assert largest_difference(one, other) <= TOLERANCE["float32"]


def test_resnet50_on_two_workers_gives_the_numbers_of_one_device(run_once):
    options = {"network": "ResNet50", "steps": 2, "optimizer": "sgd"}
    [one] = run_once(ONE_DEVICE, **options)
    for other in run_once(TWO_WORKERS, **options):
        assert largest_difference(one, other) <= TOLERANCE["float32"]
