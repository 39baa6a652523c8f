"""Which example goes where in one pass: an order that is a function of (seed, epoch) alone.

Shapes: N examples, B in a global batch, R replicas over all workers, b = ceil(B / R) in a replica's batch, C classes.
"""

from typing import NamedTuple

import numpy as np


class EpochPlan(NamedTuple):
    """Which example goes where in one pass over N examples: arrays of [steps, R, b].

    `index` is the example's position among the examples; `row` its position in the global batch; `weight` is 1, or 0
    for padding; `loss_weight` sums up to 1 over a batch (without class weights), so that replicas just add up.
    """

    index: np.ndarray  # type: ignore[assignment]  # int64. Hides tuple.index, which nobody calls.
    row: np.ndarray  # int32
    weight: np.ndarray  # float32
    loss_weight: np.ndarray  # float32

    @property
    def steps(self) -> int:
        """Batches of the pass."""
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
    """A pass in the order of the examples, for validation and for features."""
    return _plan(np.arange(num_examples), batch_size, replicas, np.ones(num_examples, np.float32))


def _plan(order: np.ndarray, batch_size: int, replicas: int, example_weights: np.ndarray) -> EpochPlan:
    """Batches of `batch_size`, each shared out over the replicas; what is missing is padded with weight 0.

    Workers then take equally many steps of equal shapes, and every example counts once. The padding repeats pictures
    of the same batch, so that batch statistics see nothing foreign.
    """
    num_examples, steps = len(order), steps_per_epoch(len(order), batch_size)
    per_replica = -(-batch_size // replicas)
    row = np.broadcast_to(np.arange(per_replica * replicas, dtype=np.int32), (steps, per_replica * replicas))
    sizes = np.minimum(batch_size, num_examples - np.arange(steps) * batch_size)[:, None]  # real examples of each batch
    index = order[np.arange(steps)[:, None] * batch_size + row % sizes]
    weight = (row < sizes).astype(np.float32)
    loss_weight = weight * example_weights[index] / sizes
    shape = (steps, replicas, per_replica)
    arrays = (index.astype(np.int64), row, weight, loss_weight.astype(np.float32))
    return EpochPlan(*(np.reshape(array, shape) for array in arrays))


def class_weights(labels: np.ndarray, num_classes: int, class_weight: str) -> np.ndarray:
    """float32 [C]: ones, or for `balanced` N / (C * pictures of the class), as scikit-learn's compute_class_weight."""
    if class_weight == "none":
        return np.ones(num_classes, np.float32)
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32)
