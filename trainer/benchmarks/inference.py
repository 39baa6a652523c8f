"""Suite `inference`: features of ResNet50 by the folded network of a job, and by Keras predict in the same precision.

Shapes: B images in a batch, S pixels to a side.
"""

import functools
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from trainer.benchmarks.suite import Baseline, Metrics, Suite, Target, one_device, rates, read_usage
from trainer.benchmarks.training_step import Workload
from trainer.models import folded, networks
from trainer.training.inference import make_inference
from trainer.training.interruption import StopReason


def inference_suite(
    *, workload: Workload, half_precision: str, build: Callable[..., networks.Network] = networks.build
) -> Suite:
    """Passes over batches in memory, of the size of the workload and of one image each, as a single request has.

    `half_precision` is the Keras dtype policy to measure in addition to float32, or ''. `build` has the arguments of
    models.networks.build.
    """
    baselines, targets = [], []
    for precision in ["float32", half_precision] if half_precision else ["float32"]:
        for batch_size in dict.fromkeys([workload.batch_size, 1]):
            name = f"{precision}, {batch_size} image{'s' if batch_size > 1 else ''} at a time"
            batches = Workload(workload.image_size, batch_size, workload.steps)
            backbone = functools.cache(functools.partial(_backbone, build, precision, workload.image_size))
            baselines.append(Baseline(f"trainer folded, {name}", _folded_passes(backbone, batches)))
            baselines.append(Baseline(f"Keras predict, {name}", _keras_passes(backbone, batches)))
            targets.append(
                Target(
                    description=f"CPU time of inference, folded / Keras predict, {name}",
                    metric="cpu_seconds_per_1000",
                    numerator=baselines[-2].name,
                    denominator=baselines[-1].name,
                    bound=1.0,
                    at_least=False,
                )
            )
    return Suite(
        name="inference",
        title=f"features by ResNet50, {workload.image_size} pixels",
        metric="cpu_seconds_per_1000",
        baselines=baselines,
        targets=targets,
        omitted=[] if half_precision else ["half precision: the processor does not compute in bfloat16"],
    )


def _backbone(build: Callable[..., networks.Network], precision: str, image_size: int) -> keras.Model:
    return build(
        num_classes=2,
        image_size=image_size,
        backbone="ResNet50",
        weights="none",
        head="average",
        precision=precision,
        seed=0,
    ).backbone


def _noise(workload: Workload) -> tf.Tensor:
    """Preprocessed noise, float32 [B, S, S, 3]."""
    shape = [workload.batch_size, workload.image_size, workload.image_size, 3]
    return tf.random.stateless_normal(shape, [1, 2], stddev=50)


def _folded_passes(backbone: Callable[[], keras.Model], workload: Workload) -> Callable[[], Metrics]:
    """As a job computes features."""

    @functools.cache
    def prepare() -> tuple[Callable, Iterator]:
        infer = make_inference(functools.partial(folded.fold(backbone()), training=False), one_device())
        batch = {"x": _noise(workload), "weight": tf.ones([workload.batch_size])}
        iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
        infer(iterator, StopReason.NONE)
        return infer, iterator

    def measure() -> Metrics:
        infer, iterator = prepare()
        start = read_usage()
        for _ in range(workload.steps):
            infer(iterator, StopReason.NONE)
        return rates(workload.num_images, start, read_usage())

    return measure


def _keras_passes(backbone: Callable[[], keras.Model], workload: Workload) -> Callable[[], Metrics]:
    @functools.cache
    def prepare() -> tf.data.Dataset:
        dataset = tf.data.Dataset.from_tensors(_noise(workload)).repeat()
        backbone().predict(dataset, steps=1, verbose=0)
        return dataset

    def measure() -> Metrics:
        dataset = prepare()
        start = read_usage()
        backbone().predict(dataset, steps=workload.steps, verbose=0)
        return rates(workload.num_images, start, read_usage())

    return measure
