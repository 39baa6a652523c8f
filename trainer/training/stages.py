"""The stages of a job: the head on features that are computed once, then the whole network on images.

Shapes: N training and V validation examples, F features, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import input_pipeline, sampler
from trainer.data.dataset import Split
from trainer.data.image_source import ImageSource
from trainer.data.input_pipeline import ArraySource, BatchTransform, FileSource
from trainer.data.preprocessing import NetworkInput
from trainer.models.networks import Network
from trainer.runtime.devices import Devices
from trainer.training import feature_cache
from trainer.training.loop import (
    ModelOutputs,
    ProfileRange,
    StopReason,
    TrainingLoop,
    make_inference,
    run_inference,
)
from trainer.training.optimizer import Recipe, make_optimizer
from trainer.training.progress import ProgressReporter
from trainer.training.trainer import HEAD, WHOLE_NETWORK, Stage

INFERENCE_BATCH = 64  # images per replica where nothing is trained


@dataclasses.dataclass(frozen=True, eq=False)
class StageInputs:
    """The inputs of both stages. `class_weights` is float32 [C], `precision` a Keras dtype policy."""

    network: Network
    devices: Devices
    images: ImageSource
    split: Split
    class_weights: np.ndarray
    batch_size: int  # global
    seed: int
    network_input: NetworkInput
    precision: str
    xla: bool
    is_chief: bool
    worker_index: int
    progress: ProgressReporter
    stop_requested: Callable[[], StopReason]


def head_stage(
    inputs: StageInputs,
    *,
    epochs: int,
    recipe: Recipe,
    feature_dir: str,
    feature_source: tuple,
    profile: ProfileRange | None,
) -> Stage:
    """The stage that trains the head on the features of all images, which are read from `feature_dir` or computed.

    `feature_source` is what the features depend on besides the images and the precision. Raises UserError if too many
    images cannot be decoded, and TrainingInterrupted.
    """
    images = inputs.images
    name = feature_cache.cache_key(images.hashes, *feature_source, inputs.precision)
    logging.info("Features of %d images: read from %s, or computed and kept there.", len(images.paths), feature_dir)
    compute = _feature_function(inputs)
    outputs = feature_cache.load_or_compute(feature_dir, name, len(images.paths), compute, is_chief=inputs.is_chief)
    images.record_unreadable(images.paths[~outputs.is_readable])
    images.check_bad_fraction()
    sources = [
        ArraySource(tf.constant(outputs.values[index]), tf.constant(outputs.is_readable[index].astype(np.float32)))
        for index in images.split_indices
    ]
    return Stage(
        name=HEAD,
        epochs=epochs,
        make_loop=_loop_factory(inputs, recipe, epochs=epochs, backbone=None, loss_scaling=False, jit_compile=False),
        training_batches=_training_batches(inputs, sources[0], lambda epoch: None),
        validation_batches=_validation_batches(inputs, sources[1], None),
        training_paths=inputs.split.training.paths,
        profile=profile,
    )


def whole_network_stage(
    inputs: StageInputs, *, epochs: int, recipe: Recipe, augment: bool, profile: ProfileRange | None
) -> Stage:
    """The stage that trains the whole network on images, which are decoded in each epoch, or once if they are cached.

    Raises UserError if too many images cannot be decoded.
    """
    compute_dtype = inputs.network.backbone.compute_dtype

    def transform(epoch: int | None) -> BatchTransform:
        seed = (inputs.seed, epoch) if augment and epoch is not None else None
        return BatchTransform(inputs.network_input.preprocessing, seed, compute_dtype)

    _decode_if_cached(inputs)
    sources = [inputs.images.source(index) for index in inputs.images.split_indices]
    inputs.images.check_bad_fraction()
    is_worth_caching = epochs > 1 and not inputs.images.is_cached
    return Stage(
        name=WHOLE_NETWORK,
        epochs=epochs,
        make_loop=_loop_factory(
            inputs,
            recipe,
            epochs=epochs,
            backbone=inputs.network.backbone,
            loss_scaling=inputs.precision == "mixed_float16",
            jit_compile=inputs.xla,
        ),
        training_batches=_training_batches(inputs, sources[0], transform),
        validation_batches=_validation_batches(inputs, sources[1], transform(None)),
        training_paths=inputs.split.training.paths,
        slow_input_advice="Try --cache=memory, or pack the folder." if is_worth_caching else "More CPU cores help.",
        profile=profile,
    )


def _feature_function(inputs: StageInputs) -> Callable[[int, int], ModelOutputs]:
    """A function (start, end) -> features float32 [end - start, F] of those images, traced once for all its calls."""
    backbone, devices = inputs.network.backbone, inputs.devices
    infer = make_inference(lambda x: backbone(x, training=False), devices)
    transform = BatchTransform(inputs.network_input.preprocessing, None, backbone.compute_dtype)
    batch_size = INFERENCE_BATCH * devices.replicas

    def compute(start: int, end: int) -> ModelOutputs:
        plan = sampler.ordered_epoch(end - start, batch_size=batch_size, replicas=devices.replicas)
        _decode_if_cached(inputs)
        source = inputs.images.source(np.arange(start, end))
        labels = np.zeros(end - start, np.int32)
        batches = input_pipeline.batches(plan, source, labels, transform=transform, devices=devices)
        with inputs.progress.bar("computing features", end - start) as bar:
            return run_inference(infer, batches, plan, on_batch=bar.update, stop_requested=inputs.stop_requested)

    return compute


def _decode_if_cached(inputs: StageInputs) -> None:
    images = inputs.images
    if images.num_undecoded:
        with inputs.progress.bar("decoding images", images.num_undecoded) as bar:
            images.decode(bar.update, inputs.worker_index)


def _loop_factory(
    inputs: StageInputs,
    recipe: Recipe,
    *,
    epochs: int,
    backbone: keras.Model | None,
    loss_scaling: bool,
    jit_compile: bool,
) -> Callable[[float], TrainingLoop]:
    """A function from a factor of the learning rate to a new TrainingLoop."""
    steps_per_epoch = sampler.steps_per_epoch(len(inputs.split.training), inputs.batch_size)

    def make_loop(learning_rate_factor: float) -> TrainingLoop:
        scaled = dataclasses.replace(recipe, learning_rate=recipe.learning_rate * learning_rate_factor)
        with inputs.devices.strategy.scope():
            optimizer = make_optimizer(
                scaled, epochs=epochs, steps_per_epoch=steps_per_epoch, loss_scaling=loss_scaling
            )
        return TrainingLoop(
            backbone,
            inputs.network.head,
            optimizer,
            devices=inputs.devices,
            batch_size=inputs.batch_size,
            seed=inputs.seed,
            label_smoothing=recipe.label_smoothing,
            dropout=recipe.dropout,
            jit_compile=jit_compile,
        )

    return make_loop


def _training_batches(
    inputs: StageInputs, source: ArraySource | FileSource, transform: Callable[[int], BatchTransform | None]
) -> Callable[[int, int], tuple[sampler.EpochPlan, Iterable]]:
    labels = inputs.split.training.labels

    def training_batches(epoch: int, first_step: int) -> tuple[sampler.EpochPlan, Iterable]:
        plan = sampler.shuffled_epoch(
            labels,
            seed=inputs.seed,
            epoch=epoch,
            batch_size=inputs.batch_size,
            replicas=inputs.devices.replicas,
            class_weights=inputs.class_weights,
        )
        return plan, input_pipeline.batches(
            plan, source, labels, transform=transform(epoch), devices=inputs.devices, first_step=first_step
        )

    return training_batches


def _validation_batches(
    inputs: StageInputs, source: ArraySource | FileSource, transform: BatchTransform | None
) -> Callable[[], tuple[sampler.EpochPlan, Iterable]]:
    labels, replicas = inputs.split.validation.labels, inputs.devices.replicas

    def validation_batches() -> tuple[sampler.EpochPlan, Iterable]:
        plan = sampler.ordered_epoch(len(labels), batch_size=INFERENCE_BATCH * replicas, replicas=replicas)
        return plan, input_pipeline.batches(plan, source, labels, transform=transform, devices=inputs.devices)

    return validation_batches
