"""Exports the best weights of a run in every requested format, each after a parity check with the in-memory model.

Shapes: n validation images of the parity check, V validation images, S pixels to a side, C classes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.artifacts import best_weights
from trainer.artifacts.best_weights import BestEpoch
from trainer.artifacts.job_dir import JobDir
from trainer.data import shards
from trainer.data.dataset import Examples
from trainer.data.preprocessing import NetworkInput, preprocess
from trainer.errors import UserError
from trainer.models import folded, networks
from trainer.models.networks import Network
from trainer.models.novelty import Novelty
from trainer.serving import converters, saved_model
from trainer.serving.converters import LabeledImage, QuantizationImages
from trainer.serving.saved_model import PARITY_BATCH_SIZE, Export, ParityReference
from trainer.storage import files

NUM_PARITY_IMAGES = 16
NUM_CALIBRATION_IMAGES = 100  # training images that give the ranges of the int8 activations


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Computes float32 as such on GPUs.

    From compute capability 8.0 on, TensorFlow rounds the inputs of convolutions to 10 bits (TensorFloat-32). The runtimes of
    other formats, on the CPU, do not: https://github.com/tensorflow/community/pull/287. Rounding ResNet50 in that way on the
    CPU moves its features by 0.14 %, which at a logit of 5 is 0.007: more than the parity check allows.
    """
    was_enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(was_enabled)


@dataclasses.dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run whose training is over: where its best weights are and how they are exported."""

    paths: JobDir
    data_dir: str
    model_dir: str
    export_formats: str  # comma-separated
    serving_precision: str  # of the SavedModel: float32 or bfloat16
    class_names: tuple[str, ...]
    training: Examples
    validation: Examples
    test: Examples
    network_input: NetworkInput
    backbone: str
    head: str
    with_webp: bool
    build_network: Callable[..., Network]  # models.networks.build, or a function with the same arguments

    @property
    def converted_formats(self) -> list[str]:
        """The formats other than SavedModel."""
        return [name for name in self.export_formats.split(",") if name != "saved_model"]

    @property
    def converted_paths(self) -> list[str]:
        """The files of the formats other than SavedModel."""
        return [converters.path(self.paths.exports, name) for name in self.converted_formats]


def rebuild_best(run: FinishedRun, temperature: float) -> Network:
    """A new float32 network with the best weights, its logits divided by `temperature`."""
    return networks.rebuild(
        run.paths.best_weights,
        num_classes=len(run.class_names),
        image_size=run.network_input.image_size,
        backbone=run.backbone,
        head=run.head,
        temperature=temperature,
        build_network=run.build_network,
    )


@full_float32()
def export_all(run: FinishedRun, best: Network, validated: BestEpoch, known: Novelty | None) -> dict[str, Any]:
    """Exports the best network in every format but tflite_int8; returns what metrics.json says of each.

    tflite_int8 may be refused, which must not keep a run from its other files: export_missing writes it after them.
    `validated` is the validation result of the network. Only the SavedModel contains the novelty score `known`. Raises
    saved_model.ParityError.
    """
    reference = dataclasses.replace(_parity_reference(run, best, validated.is_readable), novelty=known)
    precision, bound = run.serving_precision, saved_model.MAX_PROBABILITY_DIFFERENCE
    served = reference
    if precision == "bfloat16":
        served = dataclasses.replace(reference, network=folded.fold_network(best, precision))
        bound = saved_model.MAX_BFLOAT16_DIFFERENCE
    export = saved_model.save(
        run.model_dir,
        served,
        class_names=run.class_names,
        network_input=run.network_input,
        with_webp=run.with_webp,
        bound=bound,
    )
    logging.info(
        "SavedModel in %s: parity check passed, probabilities differ by at most %.1e.", precision, export.max_difference
    )
    formats = [name for name in run.converted_formats if name != "tflite_int8"]
    exports = {"saved_model": {"precision": precision, **export.as_json()}}
    return exports | _convert(run, reference, validated, formats)


@full_float32()
def export_missing(run: FinishedRun, metrics: dict, best: Network | None = None) -> dict:
    """Exports the formats that a finished run lacks; returns its metrics with theirs added, which are also written.

    `best` is the network of rebuild_best, if there is one already. Raises saved_model.ParityError, and UserError if int8 is
    less accurate.
    """
    formats = [name for name in run.converted_formats if not files.exists(converters.path(run.paths.exports, name))]
    if not formats:
        return metrics
    validated = best_weights.read(run.paths.best_weights)
    best = best or rebuild_best(run, run.paths.read_temperature())
    reference = _parity_reference(run, best, validated.is_readable)
    for name in formats:  # one by one: a later one may be refused
        exports = {**metrics.get("exports", {}), **_convert(run, reference, validated, [name])}
        metrics = {**metrics, "exports": exports}
        run.paths.write_metrics(metrics)
    return metrics


def _parity_reference(run: FinishedRun, best: Network, is_readable: np.ndarray) -> ParityReference:
    """The network that every format is made of, and what the Keras network computes in small batches."""

    @tf.function(input_signature=[tf.TensorSpec([None, *best.model.input_shape[1:]], tf.uint8)], autograph=False)
    def classify(images: tf.Tensor) -> tf.Tensor:
        return best.model(preprocess(images, run.network_input.preprocessing), training=False)

    encoded, images = _parity_images(run, is_readable)
    starts = range(0, len(encoded), PARITY_BATCH_SIZE)
    expected = np.concatenate([classify(images[start : start + PARITY_BATCH_SIZE]).numpy() for start in starts])
    return ParityReference(network=best, encoded=encoded, images=images, expected=expected)


def _parity_images(run: FinishedRun, is_readable: np.ndarray) -> tuple[list[bytes], tf.Tensor]:
    """Some validation images: their bytes, and decoded uint8 [n, S, S, 3]. Those that no longer decode are left out."""
    chosen = _evenly(np.flatnonzero(is_readable), NUM_PARITY_IMAGES)
    decoded = list(_decode(run, run.validation.paths[chosen]))
    if not decoded:
        raise UserError(
            f"No validation image in {run.data_dir} can be read any more, so the exported model cannot be compared with "
            "the in-memory model: restore the images and start again."
        )
    return [contents for _, contents, _ in decoded], tf.stack([image for _, _, image in decoded])


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the values, at equal distances."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).astype(int)]


def _decode(run: FinishedRun, paths: np.ndarray) -> Iterator[tuple[int, bytes, tf.Tensor]]:
    """Index, bytes and decoded image uint8 [S, S, 3] of each path. Those that no longer decode are left out."""
    decode = saved_model.decoder(run.network_input, with_webp=run.with_webp)
    for start in range(0, len(paths), PARITY_BATCH_SIZE):
        batch = paths[start : start + PARITY_BATCH_SIZE]
        for offset, contents in enumerate(files.parallel(lambda path: shards.read(run.data_dir, path) or b"", batch)):
            try:
                image = decode(tf.constant(contents))
            except tf.errors.InvalidArgumentError:
                continue
            yield start + offset, contents, image


def _convert(
    run: FinishedRun, reference: ParityReference, validated: BestEpoch, formats: list[str]
) -> dict[str, dict[str, Any]]:
    if not formats:
        return {}
    exports = converters.write(
        run.paths.exports,
        formats,
        reference,
        class_names=run.class_names,
        network_input=run.network_input,
        quantization=_quantization_images(run, validated),
    )
    for name, export in exports.items():
        _log_export(converters.file_name(name), export)
    return {name: export.as_json() for name, export in exports.items()}


def _log_export(name: str, export: Export) -> None:
    if export.accuracy is None:
        logging.info("%s: parity check passed, probabilities differ by at most %.1e.", name, export.max_difference)
    else:
        logging.info(
            "%s: accuracy %.4f on all %d validation images, %.4f of the network in float32.",
            name,
            export.accuracy,
            export.images,
            export.network_accuracy,
        )


def _quantization_images(run: FinishedRun, validated: BestEpoch) -> QuantizationImages:
    training = _evenly(run.training.paths, NUM_CALIBRATION_IMAGES)
    index = np.flatnonzero(validated.is_readable)
    labels = run.validation.labels[index]
    is_correct = validated.probabilities[index].argmax(axis=1) == labels

    def labeled_images() -> Iterator[LabeledImage]:
        for row, _, image in _decode(run, run.validation.paths[index]):
            yield LabeledImage(image, int(labels[row]), bool(is_correct[row]))

    return QuantizationImages(
        training=lambda: (image for _, _, image in _decode(run, training)),
        num_training=len(training),
        validation=labeled_images,
        num_validation=len(index),
    )
