"""The values that describe a benchmark suite, and the readings that every suite takes. Imports no TensorFlow."""

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from trainer.runtime.devices import Devices

RECIPES = ("default", "finetune", "logistic_regression", "keras_guide", "article")  # of the suite accuracy

Metrics = dict[str, float]  # by name; the name contains the unit


class Baseline(NamedTuple):
    """One implementation of the work of a suite. `measure()` runs it once and returns its metrics."""

    name: str
    measure: Callable[[], Metrics]


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on the ratio of one metric between two baselines; a lower bound if `at_least`, else an upper bound."""

    description: str
    metric: str
    numerator: str  # name of a baseline
    denominator: str  # name of a baseline
    bound: float
    at_least: bool = True

    def is_met(self, ratio: float) -> bool:
        """Whether the ratio is within the bound."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound


@dataclasses.dataclass(frozen=True)
class Suite:
    """Baselines that do the same work.

    `metric` is the one that the chart shows. `omitted` lists what is not measured, each with the reason or the limit.
    """

    name: str
    title: str
    metric: str
    baselines: list[Baseline]
    targets: list[Target] = dataclasses.field(default_factory=list)
    omitted: list[str] = dataclasses.field(default_factory=list)


class Usage(NamedTuple):
    """Seconds of the wall clock, and CPU seconds of all threads and of the child processes that have ended."""

    wall_seconds: float
    cpu_seconds: float


def read_usage() -> Usage:
    """The usage of this process so far. Only differences between two readings have a meaning."""
    import resource  # Windows has none; cli.run says so

    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return Usage(time.monotonic(), own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime)


def rates(num_images: int, start: Usage, end: Usage) -> Metrics:
    """Images per second, and CPU seconds per 1,000 images, between two readings."""
    return {
        "images_per_second": num_images / (end.wall_seconds - start.wall_seconds),
        "cpu_seconds_per_1000": 1000 * (end.cpu_seconds - start.cpu_seconds) / num_images,
    }


def one_device() -> "Devices":
    """The first device of this process, without a distribution strategy."""
    import tensorflow as tf

    from trainer.runtime.devices import Devices

    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return Devices(
        strategy=tf.distribute.get_strategy(),
        kind=kind,
        names=(tf.config.list_logical_devices(kind)[0].name,),
        replicas=1,
        local_replicas=1,
        first_replica=0,
    )
