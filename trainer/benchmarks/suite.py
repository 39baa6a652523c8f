"""TODO."""

import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.runtime.devices import Devices

Values = dict[str, float]


class Baseline(NamedTuple):
    """One way to do the work of a suite. `measure()` does it once and returns figures by name, with their unit."""

    name: str
    measure: Callable[[], Values]


class Target(NamedTuple):
    """A bound on a ratio of two contenders' figures, taken round by round; `at_least` or else at most."""

    text: str
    figure: str
    numerator: str
    denominator: str
    bound: float
    at_least: bool = True


class Suite(NamedTuple):
    """Contenders that do the same work. `figure` is the one that the chart shows; `left_out` says what is missing, why."""

    name: str
    title: str
    figure: str
    baselines: list[Baseline]
    targets: list[Target]
    left_out: list[str]


def used() -> np.ndarray:
    """Wall and CPU seconds so far, the latter of all threads and of children that have ended."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.monotonic(), sum(one.ru_utime + one.ru_stime for one in times)])


def rates(num_images: int, start: np.ndarray, end: np.ndarray) -> Values:
    """Pictures per second, and CPU seconds per thousand."""
    wall, cpu = end - start
    return {"images_per_second": num_images / wall, "cpu_seconds_per_1000": 1000 * cpu / num_images}


def one_device() -> Devices:
    """This process' first device, without a strategy."""
    gpus = tf.config.list_logical_devices("GPU")
    device = (gpus or tf.config.list_logical_devices("CPU"))[0]
    return Devices(tf.distribute.get_strategy(), "GPU" if gpus else "CPU", (device.name,), 1, 1, 0)


def once(prepare: Callable) -> Callable:
    """`prepare`, called at the first use only, so that a suite is cheap to describe."""
    made: list = []

    def get() -> Any:
        if not made:
            made.append(prepare())
        return made[0]

    return get
