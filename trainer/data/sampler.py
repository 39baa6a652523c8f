"""Plans the batches of one pass over the examples; the order is a function of (seed, epoch) alone.

Shapes: N examples, B in a global batch, R replicas over all workers, b = ceil(B / R) in a replica's batch, C classes.
"""

import dataclasses

import numpy as np


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
