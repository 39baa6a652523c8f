"""The best weights of a run, delivered in every format that was asked for, each compared with the live model first.

Shapes: n validation pictures on which they must agree, S pixels to a side, C classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import convert, export, image, model, shards, storage
from trainer.config import Config
from trainer.errors import UserError
from trainer.examples import Examples, Folder
from trainer.job_dir import JobDir, read_best
from trainer.model import Network

NUM_SAMPLES = 32


class Outcome(NamedTuple):
    """A run whose training is over."""

    settings: Config
    folder: Folder
    validation: Examples
    paths: JobDir
    build: Callable[..., Network]


def best_network(outcome: Outcome) -> Network:
    """A float32 network of its own with the best weights."""
    network = outcome.build(
        num_classes=len(outcome.folder.class_names),
        image_size=outcome.settings.image_size,
        weights="none",
        head=outcome.settings.head,
        precision="float32",
        seed=outcome.settings.seed,
    )
    model.load_weights(network.model, outcome.paths.best_weights, flag="best.weights.h5")
    return network


def everything(outcome: Outcome, best: Network, is_readable: np.ndarray) -> dict[str, float]:
    """Exports the best network in every format asked for; returns the largest difference that each gate saw.

    `is_readable` bool [V] tells of each validation picture whether it decoded. Raises export.ExportMismatch.
    """
    settings, live = outcome.settings, _ask(outcome, best, is_readable)
    difference = export.save(
        settings.model_dir,
        **live._asdict(),
        class_names=outcome.folder.class_names,
        image_size=settings.image_size,
        preprocessing=settings.preprocessing,
        with_webp="WebP" in outcome.folder.kinds,
    )
    logging.info("SavedModel and live model agree: probabilities differ by %.1e at most.", difference)
    return {"saved_model": difference, **_convert(outcome, live, _further_formats(settings))}


def what_is_missing(outcome: Outcome, metrics: dict) -> dict:
    """Adds to a finished run the formats that it is asked for only now; returns its metrics with their differences."""
    formats = [
        name
        for name in _further_formats(outcome.settings)
        if not storage.exists(convert.path(outcome.paths.exports, name))
    ]
    if not formats:
        return metrics
    live = _ask(outcome, best_network(outcome), read_best(outcome.paths.best_weights).is_readable)
    differences = {**metrics.get("export_differences", {}), **_convert(outcome, live, formats)}
    metrics = {**metrics, "export_differences": differences}
    storage.write_json(outcome.paths.metrics, metrics)
    return metrics


def further_paths(outcome: Outcome) -> list[str]:
    """Where the formats beside the SavedModel are."""
    return [convert.path(outcome.paths.exports, name) for name in _further_formats(outcome.settings)]


def _further_formats(settings: Config) -> list[str]:
    return [name for name in settings.export_formats.split(",") if name != "saved_model"]


class _Live(NamedTuple):
    """The best network, and what it says of some pictures."""

    network: Network
    samples: list[bytes]  # n validation pictures as they lie in their files
    pictures: tf.Tensor  # uint8 [n, S, S, 3]
    expected: np.ndarray  # float32 [n, C]


def _ask(outcome: Outcome, best: Network, is_readable: np.ndarray) -> _Live:
    samples, pictures = _samples(outcome, is_readable)
    pixels = image.preprocess(pictures, outcome.settings.preprocessing)
    return _Live(best, samples, pictures, best.model(pixels, training=False).numpy())


def _samples(outcome: Outcome, is_readable: np.ndarray) -> tuple[list[bytes], tf.Tensor]:
    """Some validation pictures: their bytes, and decoded uint8 [n, S, S, 3]. Those gone bad since are passed over."""
    settings, readable = outcome.settings, np.flatnonzero(is_readable)
    chosen = readable[np.linspace(0, len(readable) - 1, min(NUM_SAMPLES, len(readable))).astype(int)]
    samples, pictures = [], []
    for path in outcome.validation.paths[chosen]:
        contents = shards.read(settings.data_dir, path) or b""
        try:
            pictures.append(image.decode(tf.constant(contents), settings.image_size))
        except tf.errors.InvalidArgumentError:
            continue
        samples.append(contents)
    if not samples:
        raise UserError(
            f"No validation picture in {settings.data_dir} can be read any more, so the exported model cannot be "
            "compared with the live one: restore them and start again."
        )
    return samples, tf.stack(pictures)


def _convert(outcome: Outcome, live: _Live, formats: list[str]) -> dict[str, float]:
    if not formats:
        return {}
    differences = convert.write(
        outcome.paths.exports,
        formats,
        live.network,
        class_names=outcome.folder.class_names,
        image_size=outcome.settings.image_size,
        preprocessing=outcome.settings.preprocessing,
        pictures=live.pictures,
        expected=live.expected,
    )
    for name, difference in differences.items():
        logging.info("model.%s and live model agree: probabilities differ by %.1e at most.", name, difference)
    return differences
