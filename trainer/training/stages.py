"""The stages of a job: the head on features that are computed once, then the whole network on images.

Shapes: N training and V validation examples, F features, C classes.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer import formatting
from trainer.artifacts.metrics import mcnemar_test
from trainer.data import input_pipeline, sampler
from trainer.data.dataset import Split
from trainer.data.image_source import ImageSource
from trainer.data.input_pipeline import ArraySource, BatchTransform, FileSource
from trainer.data.preprocessing import Augmentation, NetworkInput
from trainer.models import folded, networks
from trainer.models.networks import Network
from trainer.runtime import agreement
from trainer.runtime.devices import Devices
from trainer.training import feature_cache, head_solver
from trainer.training.head_solver import HeadFit
from trainer.training.inference import ModelOutputs, evaluate_logits, make_inference, run_inference
from trainer.training.interruption import StopReason
from trainer.training.loop import EpochTotals, ProfileRange, TrainingLoop
from trainer.training.optimizer import Recipe, make_optimizer
from trainer.training.progress import ProgressReporter
from trainer.training.trainer import HEAD, WHOLE_NETWORK, Stage

INFERENCE_BATCH = 64  # images per replica where nothing is trained
MIN_FLIP_LOSS = 0.05  # of the accuracy, from which on flips may change labels: without flips little is lost
MAX_FLIP_P_VALUE = 0.01  # of McNemar's test that the loss is chance
UNTIL_DONE = -1  # --head_epochs of a head that is fitted to its optimum
EPOCHS_OF_LARGE_FOLDERS = 15  # of the head, with thousands of steps


@dataclasses.dataclass(frozen=True, eq=False)
class StageInputs:
    """The inputs of both stages. `class_weights` is float32 [C], `precision` a Keras dtype policy."""

    network: Network
    devices: Devices
    images: ImageSource
    split: Split
    class_weights: np.ndarray
    batch_size: int  # global
    accumulate_steps: str  # of the whole network: a number, or auto
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

    `epochs` -1 fits the head to its optimum (see head_solver), or trains EPOCHS_OF_LARGE_FOLDERS epochs where the
    features are too many for that. `feature_source` is what the features depend on besides the images and the
    precision. Raises UserError if too many images cannot be decoded, and TrainingInterrupted.
    """
    images = inputs.images
    batch_times: list[tuple[float, int]] = []
    outputs = cached_features(inputs, feature_dir=feature_dir, feature_source=feature_source, batch_times=batch_times)
    table = input_pipeline.array_source(outputs.values, outputs.is_readable)
    sources = [table._replace(indices=tf.constant(index)) for index in images.split_indices]
    fit_head = None
    if epochs == UNTIL_DONE:
        training, num_classes = images.split_indices[0], len(inputs.class_weights)
        is_small = head_solver.fits(len(training), outputs.values.shape[1], num_classes)
        epochs = 1 if is_small else EPOCHS_OF_LARGE_FOLDERS
        if is_small:
            fit_head = _head_fit(inputs, ModelOutputs(outputs.values[training], outputs.is_readable[training]))
    return Stage(
        name=HEAD,
        epochs=epochs,
        fit_head=fit_head,
        feature_seconds_per_image=_seconds_per_image(batch_times),
        make_loop=_loop_factory(inputs, recipe, epochs=epochs, backbone=None, loss_scaling=False, jit_compile=False),
        training_batches=_training_batches(inputs, sources[0], lambda epoch: None),
        validation_batches=_validation_batches(inputs, sources[1], None),
        training_paths=inputs.split.training.paths,
        profile=profile,
    )


def compute_features(inputs: StageInputs) -> ModelOutputs:
    """Features float32 [N, F] of all images by the frozen backbone, in the order of images.paths."""
    return _feature_function(inputs, [])(0, len(inputs.images.paths), lambda outputs: None)


def cached_features(
    inputs: StageInputs, *, feature_dir: str, feature_source: tuple, batch_times: list[tuple[float, int]]
) -> ModelOutputs:
    """The features of all images, in the order of images.paths: read from `feature_dir`, or computed and kept there.

    Adds to `batch_times` as _feature_function does. Raises UserError if too many images cannot be decoded, and
    TrainingInterrupted.
    """
    images = inputs.images
    logging.info("Features of %d images: read from %s, or computed and kept there.", len(images.paths), feature_dir)
    with inputs.progress.phase("features"):
        outputs = feature_cache.load_or_compute(
            feature_dir,
            _feature_name(inputs, feature_source),
            len(images.paths),
            _feature_function(inputs, batch_times),
            is_chief=inputs.is_chief,
            devices=inputs.devices,
        )
    images.record_unreadable(images.paths[~outputs.is_readable])
    images.check_bad_fraction()
    return outputs


def read_features(inputs: StageInputs, *, feature_dir: str, feature_source: tuple) -> ModelOutputs | None:
    """The features that the head was trained on, in the order of images.paths; None if they are no longer there."""
    return feature_cache.load(feature_dir, _feature_name(inputs, feature_source), len(inputs.images.paths))


def _feature_name(inputs: StageInputs, feature_source: tuple) -> str:
    """The key of cached features. In half precision, those of a folded backbone are not those of earlier versions."""
    variant = [] if inputs.precision == "float32" else ["folded"]  # in float32 they differ by rounding alone
    return feature_cache.cache_key(inputs.images.hashes, *feature_source, inputs.precision, *variant)


def _head_fit(inputs: StageInputs, features: ModelOutputs) -> Callable[[], EpochTotals]:
    """A function that fits the head to the training features, on the chief alone, and sets it on all workers."""
    head, labels = inputs.network.head, inputs.split.training.labels
    values, labels = features.values[features.is_readable], labels[features.is_readable]

    def fit() -> EpochTotals:
        logging.info("Fitting the head to the features of %d training images.", len(values))
        started = time.monotonic()
        num_classes, packed = len(inputs.class_weights), None
        if inputs.is_chief:
            solution = head_solver.fit(
                values,
                labels,
                num_classes=num_classes,
                is_balanced=bool((inputs.class_weights != 1).any()),
                seed=inputs.seed,
            )
            _log_head_fit(solution, values.shape)
            packed = np.concatenate([solution.kernel, solution.bias[None]])
        agreed = agreement.from_chief(packed, (values.shape[1] + 1, num_classes), inputs.devices)
        for variable, value in zip(head.variables, (agreed[:-1], agreed[-1]), strict=True):
            variable.assign(value)
        result = evaluate_logits(
            ModelOutputs(values @ agreed[:-1] + agreed[-1], np.ones(len(values), bool)), labels, label_smoothing=0.0
        )
        return EpochTotals(
            steps=1,
            loss=result.loss * len(values),
            correct=result.accuracy * len(values),
            examples=float(len(values)),
            seconds=time.monotonic() - started,
        )

    return fit


def _log_head_fit(solution: HeadFit, shape: tuple[int, ...]) -> None:
    accuracy = solution.cross_validated_accuracy
    logging.info(
        "Head: logistic regression on %d x %d features, C = %.2g%s.",
        shape[0],
        shape[1],
        solution.inverse_regularization,
        ""
        if accuracy is None
        else f" by cross-validation, cross-validated accuracy {formatting.share(accuracy * shape[0], shape[0])}",
    )


def whole_network_stage(
    inputs: StageInputs, *, epochs: int, recipe: Recipe, augment: str, flips: bool, profile: ProfileRange | None
) -> Stage:
    """The stage that trains the whole network on images, which are decoded in each epoch, or once if they are cached.

    `augment` is the value of --augment. Raises UserError if too many images cannot be decoded.
    """
    input_dtype = networks.input_dtype(inputs.network.backbone)

    def transform(epoch: int | None) -> BatchTransform:
        augmentation = None
        if augment != "none" and epoch is not None:
            augmentation = Augmentation(inputs.seed, epoch, augment, flips)
        return BatchTransform(inputs.network_input.preprocessing, augmentation, input_dtype)

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
            accumulate_steps=inputs.accumulate_steps,
        ),
        training_batches=_training_batches(inputs, sources[0], transform),
        validation_batches=_validation_batches(inputs, sources[1], transform(None)),
        training_paths=inputs.split.training.paths,
        slow_input_advice="Try --cache=memory, or pack the folder." if is_worth_caching else "More CPU cores help.",
        profile=profile,
    )


def flips_keep_labels(inputs: StageInputs, probabilities: np.ndarray) -> bool:
    """Whether flipped validation images are classified as well as they are, by the head that gave `probabilities`.

    The head has seen no flipped image. If it classifies significantly fewer of them correctly, left and right are likely
    to matter to the labels, and augmentation must not flip. `probabilities` is float32 [V, C], of the images as they are.
    """
    backbone, head, labels = inputs.network.backbone, inputs.network.head, inputs.split.validation.labels
    _decode_if_cached(inputs)
    source = inputs.images.source(inputs.images.split_indices[1])
    transform = BatchTransform(inputs.network_input.preprocessing, None, networks.input_dtype(backbone))
    plan, batches = _validation_batches(inputs, source, transform)()
    with inputs.devices.strategy.scope():
        inference = folded.fold(backbone)
    infer = make_inference(lambda x: head(inference(x[:, :, ::-1], training=False), training=False), inputs.devices)
    with (
        inputs.progress.phase(
            "flips", "Classifying flipped validation images: do left and right matter to the labels?"
        ),
        inputs.progress.bar("flipped images", len(labels)) as bar,
    ):
        outputs = run_inference(
            infer,
            batches,
            plan,
            on_batch=lambda outputs: bar.update(len(outputs.values)),
            stop_requested=inputs.stop_requested,
        )
    as_is, flipped = (
        (values.argmax(axis=1) == labels)[outputs.is_readable] for values in (probabilities, outputs.values)
    )
    comparison = mcnemar_test(as_is, flipped)
    keep = comparison.difference > -MIN_FLIP_LOSS or comparison.p_value > MAX_FLIP_P_VALUE
    logging.info(
        "Of %d validation images the head classifies %d correctly, flipped left to right %d: augmentation %s.",
        len(flipped),
        as_is.sum(),
        flipped.sum(),
        "flips images" if keep else "does not flip images, because left and right matter to the labels",
    )
    return keep


def _seconds_per_image(batch_times: list[tuple[float, int]]) -> float | None:
    """From the end and the size of each batch; without the first one, which builds the graph. None if it is the only one."""
    if len(batch_times) < 2:
        return None
    return (batch_times[-1][0] - batch_times[0][0]) / sum(size for _, size in batch_times[1:])


def feature_batch_size(device_kind: str, precision: str) -> int:
    """Images per replica at a time of which features are computed, on devices of TensorFlow's kind CPU or GPU."""
    if device_kind == "CPU" and precision == "float32":
        # At 224 pixels, 16 need half a gigabyte less memory than 64, in the same CPU time (two cores of an AMD EPYC). One
        # image per core is a guess. In bfloat16, a batch costs more beside its images, and its activations half the memory.
        return min(INFERENCE_BATCH, max(16, os.cpu_count() or 1))
    return INFERENCE_BATCH


def _feature_function(inputs: StageInputs, batch_times: list[tuple[float, int]]) -> feature_cache.Compute:
    """A function that computes the features of a range of images, traced once for all its calls.

    It adds the end of each batch, in seconds of the monotonic clock, and its number of images to `batch_times`.
    """
    backbone, devices = inputs.network.backbone, inputs.devices

    @functools.cache
    def make_infer() -> Callable:  # not where all features are cached
        with devices.strategy.scope():
            inference = folded.fold(backbone)
        return make_inference(lambda x: inference(x, training=False), devices)

    transform = BatchTransform(inputs.network_input.preprocessing, None, networks.input_dtype(backbone))
    batch_size = feature_batch_size(devices.kind, inputs.precision) * devices.replicas

    def compute(start: int, end: int, on_features: Callable[[ModelOutputs], None]) -> ModelOutputs:
        plan = sampler.ordered_epoch(end - start, batch_size=batch_size, replicas=devices.replicas)
        _decode_if_cached(inputs)
        source = inputs.images.source(np.arange(start, end))
        labels = np.zeros(end - start, np.int32)
        batches = input_pipeline.batches(plan, source, labels, transform=transform, devices=devices)
        with inputs.progress.bar("computing features", end - start) as bar:

            def on_batch(outputs: ModelOutputs) -> None:
                batch_times.append((time.monotonic(), len(outputs.values)))
                bar.update(len(outputs.values))
                on_features(outputs)

            return run_inference(make_infer(), batches, plan, on_batch=on_batch, stop_requested=inputs.stop_requested)

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
    accumulate_steps: str = "1",
) -> Callable[[float], TrainingLoop]:
    """A function from a factor of the learning rate to a new TrainingLoop. `accumulate_steps` is a number or `auto`."""
    steps_per_epoch = sampler.steps_per_epoch(len(inputs.split.training), inputs.batch_size)

    def make_loop(learning_rate_factor: float) -> TrainingLoop:
        scaled = dataclasses.replace(recipe, learning_rate=recipe.learning_rate * learning_rate_factor)
        with inputs.devices.strategy.scope():
            optimizer = make_optimizer(
                scaled, epochs=epochs, steps_per_epoch=steps_per_epoch, loss_scaling=loss_scaling
            )
        loop = TrainingLoop(
            backbone,
            inputs.network.head,
            optimizer,
            devices=inputs.devices,
            batch_size=inputs.batch_size,
            seed=inputs.seed,
            label_smoothing=recipe.label_smoothing,
            dropout=recipe.dropout,
            jit_compile=jit_compile,
            accumulate_steps=1 if accumulate_steps == "auto" else int(accumulate_steps),
        )
        if backbone and accumulate_steps == "auto":
            loop.choose_accumulate_steps(backbone.input_shape[1:], networks.input_dtype(backbone))
        return loop

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
