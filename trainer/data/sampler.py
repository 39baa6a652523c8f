"""Plans the batches of one pass over the examples; the order is a function of (seed, epoch) alone.

Shapes: N examples, B in a global batch, R replicas over all workers, b = ceil(B / R) in a replica's batch, C classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from trainer.formatting import general, number, shorten, translate

MAX_IMBALANCE = 10  # of the largest class to the smallest: beyond it, accuracy hardly depends on the smallest


@dataclasses.dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of one pass over N examples: arrays [steps, R, b]."""

    index: np.ndarray  # int64, index of the example
    row: np.ndarray  # int32, index in the global batch
    weight: np.ndarray  # float32, 1, or 0 for padding
    loss_weight: (
        np.ndarray
    )  # float32, sums to 1 over a global batch without class weights, so replicas add their losses

    @property
    def steps(self) -> int:
        """Number of global batches."""
        return len(self.index)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of global batches in one pass; the last one may be smaller."""
    return -(-num_examples // batch_size)


def shuffled_epoch(
    labels: np.ndarray, *, seed: int, epoch: int, batch_size: int, replicas: int, class_weights: np.ndarray
) -> EpochPlan:
    """A shuffled pass; `labels` int [N], `class_weights` float32 [C]."""
    order = np.random.default_rng([seed, epoch]).permutation(len(labels))
    return _plan(order, batch_size, replicas, class_weights[labels])


def ordered_epoch(num_examples: int, *, batch_size: int, replicas: int) -> EpochPlan:
    """A pass in the order of the examples, for validation and for computing features."""
    return _plan(np.arange(num_examples), batch_size, replicas, np.ones(num_examples, np.float32))


def _plan(order: np.ndarray, batch_size: int, replicas: int, example_weights: np.ndarray) -> EpochPlan:
    """Batches of `batch_size`, divided over the replicas and padded with examples of weight 0.

    All workers take the same number of steps with the same shapes, and every example counts once. The padding repeats
    images of the same batch, so batch statistics contain no other images.
    """
    num_examples, steps = len(order), steps_per_epoch(len(order), batch_size)
    per_replica = -(-batch_size // replicas)
    row = np.broadcast_to(np.arange(per_replica * replicas, dtype=np.int32), (steps, per_replica * replicas))
    sizes = np.minimum(batch_size, num_examples - np.arange(steps) * batch_size)[:, None]  # real examples of each batch
    index = order[np.arange(steps)[:, None] * batch_size + row % sizes]
    weight = (row < sizes).astype(np.float32)
    loss_weight = weight * example_weights[index] / sizes
    shape = (steps, replicas, per_replica)
    return EpochPlan(
        index=np.reshape(index.astype(np.int64), shape),
        row=np.reshape(row, shape),
        weight=np.reshape(weight, shape),
        loss_weight=np.reshape(loss_weight.astype(np.float32), shape),
    )


def class_weights(labels: np.ndarray, num_classes: int, class_weight: str) -> np.ndarray:
    """float32 [C]: ones, or for `balanced` N / (C * images of the class), as scikit-learn's compute_class_weight."""
    if class_weight == "none":
        return np.ones(num_classes, np.float32)
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32)


def describe_imbalance(counts: Mapping[str, int], class_weight: str) -> str:
    """What the log and the report say of the images per class, in two sentences; "" if no class is rare.

    `class_weight` is the value of --class_weight. The text has the language of formatting.in_language.
    """
    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    ratio = counts[largest] / max(counts[smallest], 1)
    if ratio <= MAX_IMBALANCE:
        return ""
    rare, common = (f"“{shorten(name, 40)}”" for name in (smallest, largest))
    if class_weight == "balanced":
        effect = translate("--class_weight=balanced counts each class equally in the loss.")
    else:
        effect = translate(
            "--class_weight=balanced would count an image of %(rare)s %(ratio)s times as much as one of %(common)s: usually "
            "more images of rare classes are found, and more other images are taken for them.",
            rare=rare,
            ratio=general(ratio, 3),
            common=common,
        )
    counted = translate(
        "The class %(rare)s has %(few)s images, %(common)s has %(many)s.",
        rare=rare,
        few=number(counts[smallest]),
        common=common,
        many=number(counts[largest]),
    )
    return f"{counted} {effect}"


def log_imbalance(labels: np.ndarray, class_names: Sequence[str], class_weight: str) -> None:
    """Logs what `describe_imbalance` says of the training labels, int [N]."""
    counts = dict(zip(class_names, np.bincount(labels, minlength=len(class_names)).tolist(), strict=True))
    if text := describe_imbalance(counts, class_weight):
        logging.warning("Training images: %s The report leads with the balanced accuracy.", text)
