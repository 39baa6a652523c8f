"""Exports the best weights of a run in every requested format, each after a parity check with the in-memory model.

Shapes: n validation images of the parity check, V validation images, S pixels to a side, C classes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.artifacts import best_weights
from trainer.artifacts.job_dir import JobDir
from trainer.data import shards
from trainer.data.dataset import Examples
from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
from trainer.errors import UserError
from trainer.models import networks
from trainer.models.networks import Network
from trainer.models.novelty import Novelty
from trainer.serving import converters, saved_model
from trainer.serving.saved_model import ParityReference
from trainer.storage import files

NUM_PARITY_IMAGES = 32


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
    class_names: tuple[str, ...]
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
def export_all(run: FinishedRun, best: Network, is_readable: np.ndarray, known: Novelty | None) -> dict[str, float]:
    """Exports the best network in every format; returns the largest probability difference of each parity check.

    `is_readable` is bool [V], false for validation images that could not be decoded. Only the SavedModel contains the
    novelty score `known`. Raises saved_model.ParityError.
    """
    reference = dataclasses.replace(_parity_reference(run, best, is_readable), novelty=known)
    difference = saved_model.save(
        run.model_dir,
        reference,
        class_names=run.class_names,
        network_input=run.network_input,
        with_webp=run.with_webp,
    )
    logging.info("SavedModel: parity check passed, probabilities differ by at most %.1e.", difference)
    return {"saved_model": difference, **_convert(run, reference, run.converted_formats)}


@full_float32()
def export_missing(run: FinishedRun, metrics: dict) -> dict:
    """Exports the formats that a finished run lacks; returns its metrics with their differences added."""
    formats = [name for name in run.converted_formats if not files.exists(converters.path(run.paths.exports, name))]
    if not formats:
        return metrics
    is_readable = best_weights.read(run.paths.best_weights).is_readable
    reference = _parity_reference(run, rebuild_best(run, run.paths.read_temperature()), is_readable)
    differences = {**metrics.get("export_differences", {}), **_convert(run, reference, formats)}
    metrics = {**metrics, "export_differences": differences}
    run.paths.write_metrics(metrics)
    return metrics


def _parity_reference(run: FinishedRun, best: Network, is_readable: np.ndarray) -> ParityReference:
    encoded, images = _parity_images(run, is_readable)
    expected = best.model(preprocess(images, run.network_input.preprocessing), training=False).numpy()
    return ParityReference(network=best, encoded=encoded, images=images, expected=expected)


def _parity_images(run: FinishedRun, is_readable: np.ndarray) -> tuple[list[bytes], tf.Tensor]:
    """Some validation images: their bytes, and decoded uint8 [n, S, S, 3]. Those that no longer decode are left out."""
    readable = np.flatnonzero(is_readable)
    chosen = readable[np.linspace(0, len(readable) - 1, min(NUM_PARITY_IMAGES, len(readable))).astype(int)]
    encoded, images = [], []
    for path in run.validation.paths[chosen]:
        contents = shards.read(run.data_dir, path) or b""
        try:
            images.append(decode_image(tf.constant(contents), run.network_input))
        except tf.errors.InvalidArgumentError:
            continue
        encoded.append(contents)
    if not encoded:
        raise UserError(
            f"No validation image in {run.data_dir} can be read any more, so the exported model cannot be compared with "
            "the in-memory model: restore the images and start again."
        )
    return encoded, tf.stack(images)


def _convert(run: FinishedRun, reference: ParityReference, formats: list[str]) -> dict[str, float]:
    if not formats:
        return {}
    differences = converters.write(
        run.paths.exports,
        formats,
        reference,
        class_names=run.class_names,
        network_input=run.network_input,
    )
    for name, difference in differences.items():
        logging.info("model.%s: parity check passed, probabilities differ by at most %.1e.", name, difference)
    return differences
