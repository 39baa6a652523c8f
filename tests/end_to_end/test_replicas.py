"""One device, two devices, two hosts: the same numbers. Each run is a process of its own (tests/replica_run.py)."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.support.images import write_images
from tests.support.paths import REPLICA_RUN
from tests.support.processes import free_ports

SCRIPT = REPLICA_RUN
# Relative. Half precision rounds activations to 8 or 11 bits, and replicas add up in another order.
TOLERANCE = {"float32": 1e-5, "mixed_bfloat16": 2e-2, "mixed_float16": 5e-3}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 pictures of three classes, 61 of which are trained on."""
    return write_images(tmp_path_factory.mktemp("pictures"), {"a": 30, "b": 20, "c": 14})


@pytest.fixture(scope="module")
def numbers(folder, tmp_path_factory):
    """A function from a way to run and its options to what it leaves: arrays by name, one dict per worker."""
    outputs = tmp_path_factory.mktemp("numbers")
    known = {}

    def of(way: str, **options) -> list[dict[str, np.ndarray]]:
        key = (way, *sorted(options.items()))
        if key not in known:
            known[key] = run(way, options, folder, outputs / str(len(known)))
        return known[key]

    return of


def run(way: str, options: dict, folder: pathlib.Path, output: pathlib.Path) -> list[dict[str, np.ndarray]]:
    workers = 2 if way == "two workers" else 1
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments += [f"--devices={2 if way == 'two devices' else 1}"]
    addresses = [f"localhost:{port}" for port in free_ports(workers)]
    processes = []
    for index in range(workers):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {
            **os.environ,
            "TF_CONFIG": json.dumps(task) if workers > 1 else "",
            "TF_NUM_INTRAOP_THREADS": "1",
        }
        command = [sys.executable, SCRIPT, folder, f"{output}-{index}.npz", *arguments]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in processes:
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
    return [dict(np.load(f"{output}-{index}.npz")) for index in range(workers)]


def largest_difference(one: dict, other: dict) -> dict[str, float]:
    """Relative differences: the largest of any step's loss, and of all weights as one vector, to its length.

    Not of each weight: a bias that is still near 0 after 20 steps differs by a rounding of what was added to it.
    """
    losses = [each["rows"][:, 0] for each in (one, other)]
    weights = [np.concatenate([each[name].ravel() for name in one if name[0] == "w"]) for each in (one, other)]
    return {
        "loss": float(np.max(np.abs(losses[0] - losses[1]) / losses[0])),
        "weights": float(np.linalg.norm(weights[0] - weights[1]) / np.linalg.norm(weights[0])),
    }


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("way", ["two devices", "two workers"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_losses_and_weights_are_those_of_one_device(numbers, record_property, way, precision, optimizer):
    if optimizer == "adam" and precision != "float32":
        pytest.skip("Adam divides by the gradient's size, so that rounding of half precision is all that is left")
    options = {"precision": precision, "optimizer": optimizer}
    [one] = numbers("one device", **options)
    for other in numbers(way, **options):
        assert other["replicas"] == 2
        assert len(one["rows"]) == len(other["rows"]) == 20
        found = largest_difference(one, other)
        record_property("largest_difference", found)
        print(f"{way}, {optimizer}, {precision}: {found}")
        assert max(found.values()) <= TOLERANCE[precision]
        np.testing.assert_array_equal(one["rows"][:, 2], other["rows"][:, 2])  # each example counted once
        assert one["validation"][1] == other["validation"][1]


@pytest.mark.parametrize("way", ["one device", "two devices", "two workers"])
def test_compiled_by_xla_the_numbers_are_those_of_one_device_without(numbers, way):
    [one] = numbers("one device", still=1)
    for other in numbers(way, still=1, xla=1):
        found = largest_difference(one, other)
        print(f"{way}, XLA: {found}")
        assert max(found.values()) <= TOLERANCE["float32"]


def test_both_workers_end_with_the_same_weights_bit_for_bit(numbers):
    chief, worker = numbers("two workers", precision="float32", optimizer="sgd")
    for name in chief:
        np.testing.assert_array_equal(chief[name], worker[name])


@pytest.mark.parametrize("way", ["two devices", "two workers"])
def test_validation_of_the_same_weights_is_exactly_the_same(numbers, way):
    [one] = numbers("one device", steps=0)
    for other in numbers(way, steps=0):
        np.testing.assert_array_equal(one["validation"], other["validation"])


def test_many_steps_in_one_loop_are_the_same_numbers(numbers):
    [many] = numbers("one device", precision="float32", optimizer="sgd")
    [single] = numbers("one device", precision="float32", optimizer="sgd", steps_per_loop=1)
    for name in many:
        np.testing.assert_array_equal(many[name], single[name])


def test_a_batch_that_three_devices_cannot_share_evenly_stays_what_the_flag_says(numbers):
    [one] = numbers("one device", precision="float32", optimizer="sgd", batch_size=7)
    [other] = numbers("two devices", precision="float32", optimizer="sgd", batch_size=7)
    np.testing.assert_array_equal(one["rows"][:, 2], other["rows"][:, 2])


@pytest.mark.parametrize("way", ["two devices", "two workers"])
def test_resnet50_itself_has_the_same_numbers(numbers, way):
    options = {"network": "resnet50", "steps": 4, "optimizer": "sgd"}
    [one] = numbers("one device", **options)
    for other in numbers(way, **options):
        found = largest_difference(one, other)
        print(f"{way}, ResNet50: {found}")
        assert max(found.values()) <= TOLERANCE["float32"]
