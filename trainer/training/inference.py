"""Passes over images or features whose results do not depend on the number of replicas.

Shapes: N examples, V of them in validation, R replicas, b examples in the batch of a replica, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.artifacts.metrics import classification_metrics
from trainer.data.input_pipeline import page_aligned
from trainer.data.sampler import EpochPlan
from trainer.errors import UserError
from trainer.runtime.devices import Devices
from trainer.training import interruption
from trainer.training.interruption import StopReason, TrainingInterrupted

_ROWS_IN_FLOAT64 = 4096  # at a time: 33 MB for each intermediate result of 1,000 classes


class ModelOutputs(NamedTuple):
    """Outputs of N examples, in their order: float32 [N, width]; bool [N], false where an image could not be decoded."""

    values: np.ndarray
    is_readable: np.ndarray


def make_inference(network: Callable[[tf.Tensor], tf.Tensor], devices: Devices) -> Callable:
    """A compiled function (iterator of batches, stop) -> float32 [R * b, width + 2] of the next batch.

    Each row is the output, the weight of the row, the reason to stop.
    """

    def replica_infer(batch: dict[str, tf.Tensor], stop: tf.Tensor) -> tf.Tensor:
        output = tf.cast(network(batch["x"]), tf.float32)
        weight = batch["weight"][:, None]
        output = tf.concat([output, weight, tf.fill(tf.shape(weight), stop)], axis=1)
        if devices.replicas > 1:
            output = tf.distribute.get_replica_context().all_gather(output, axis=0)
        return output

    @tf.function(autograph=False, reduce_retracing=True)
    def infer(batch: Any, stop: tf.Tensor) -> tf.Tensor:
        return devices.strategy.experimental_local_results(devices.strategy.run(replica_infer, args=(batch, stop)))[0]

    def infer_next(iterator: Iterator, stop: StopReason) -> np.ndarray:
        with devices.waiting("a pass over images"):  # several workers read the next batch together, too
            return infer(next(iterator), tf.constant(float(stop))).numpy()

    return infer_next


def run_inference(
    infer: Callable,
    batches: Iterable,
    plan: EpochPlan,
    *,
    on_batch: Callable[[ModelOutputs], None] = lambda outputs: None,
    stop_requested: Callable[[], StopReason] = interruption.never,
) -> ModelOutputs:
    """Runs `infer` of make_inference over one pass. After each batch, `on_batch` is called with its outputs.

    Raises TrainingInterrupted after the batch in which any worker asks to stop.
    """
    num_examples = int(plan.weight.sum())
    values, is_readable, iterator = None, np.zeros(num_examples, bool), iter(batches)
    for step in range(plan.steps):
        output = infer(iterator, stop_requested())
        if output[:, -1].any():
            raise TrainingInterrupted(StopReason(int(output[:, -1].max())))
        is_real = plan.weight[step].reshape(-1) > 0
        index = plan.index[step].reshape(-1)[is_real]
        if values is None:
            values = page_aligned((num_examples, output.shape[1] - 2), np.float32)
        values[index] = output[is_real, :-2]
        is_readable[index] = output[is_real, -2] > 0
        on_batch(ModelOutputs(values[index], is_readable[index]))
    if values is None:
        raise ValueError("batches is empty: pass at least one batch.")
    return ModelOutputs(values, is_readable)


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
    """The result of a validation pass; unreadable images do not count. `probabilities` float32 [V, C]."""

    loss: float
    accuracy: float
    balanced_accuracy: float
    probabilities: np.ndarray
    is_readable: np.ndarray


def evaluate_logits(outputs: ModelOutputs, labels: np.ndarray, label_smoothing: float) -> Validation:
    """Loss and accuracy in float64 on the host, so that they do not depend on how replicas shared the images."""
    logits, is_readable = outputs
    if not is_readable.any():
        raise UserError("No validation image can be decoded any more: check the files in --data_dir.")
    num_classes = logits.shape[1]
    losses, probabilities = np.zeros(len(logits)), np.zeros(logits.shape, np.float32)
    for start in range(0, len(logits), _ROWS_IN_FLOAT64):
        part = slice(start, start + _ROWS_IN_FLOAT64)
        shifted = logits[part].astype(np.float64) - logits[part].max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        of_label = log_probabilities[np.arange(len(shifted)), labels[part]]
        sums = log_probabilities.sum(axis=1)
        losses[part] = -(1 - label_smoothing) * of_label - label_smoothing / num_classes * sums
        probabilities[part] = np.exp(log_probabilities)
    predicted = logits.argmax(axis=1)
    metrics = classification_metrics(labels[is_readable], predicted[is_readable], num_classes)
    return Validation(
        loss=float(losses[is_readable].mean()),
        accuracy=metrics.accuracy,
        balanced_accuracy=metrics.balanced_accuracy,
        probabilities=probabilities,
        is_readable=is_readable,
    )
