"""Whether all workers of a job have the same flags, data and checkpoint; values that the chief computes for all."""

import hashlib

import numpy as np
import tensorflow as tf

from trainer.runtime.devices import Devices


def find_mismatched_replica(description: str, devices: Devices) -> int | None:
    """Index of the first replica of all workers whose `description` differs from that of replica 0, None if all agree.

    A collective operation: every worker must call it at the same point.
    """
    digests = _gather(np.frombuffer(hashlib.sha256(description.encode()).digest(), np.int64), devices)
    mismatched = np.flatnonzero((digests != digests[0]).any(axis=1))
    return int(mismatched[0]) if len(mismatched) else None


def largest(value: int, devices: Devices) -> int:
    """The largest value of all workers. A collective operation: every worker must call it at the same point."""
    return int(_gather(np.array([value]), devices).max())


def _gather(row: np.ndarray, devices: Devices) -> np.ndarray:
    """The int64 rows [k] of all replicas, as [R, k]."""

    @tf.function(autograph=False)
    def gather() -> tf.Tensor:
        def replica_gather() -> tf.Tensor:
            return tf.distribute.get_replica_context().all_gather(tf.constant(row[None]), axis=0)

        return devices.strategy.experimental_local_results(devices.strategy.run(replica_gather))[0]

    with devices.waiting("comparing the state of all workers"):
        return gather().numpy() if devices.replicas > 1 else row[None]


def barrier(devices: Devices) -> None:
    """Returns when every worker has called it."""
    find_mismatched_replica("", devices)


def from_chief(values: np.ndarray | None, shape: tuple[int, ...], devices: Devices) -> np.ndarray:
    """The chief's float32 `values` of that shape, the same bits on every worker; the others pass None.

    A collective operation: every worker must call it at the same point. Another processor may round differently, so
    what one worker computes must not be computed again by the others.
    """
    if devices.replicas == 1:
        assert values is not None
        return values
    local = np.zeros((devices.local_replicas, *shape), np.float32)
    if values is not None:
        local[0] = values  # summed over all replicas of all workers, of which the others hold zeros

    @tf.function(autograph=False)
    def sum_over_replicas() -> tf.Tensor:
        def replica_sum() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            own = tf.gather(tf.constant(local), context.replica_id_in_sync_group - devices.first_replica)
            return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

        return devices.strategy.experimental_local_results(devices.strategy.run(replica_sum))[0]

    with devices.waiting("getting a result of the chief"):
        return sum_over_replicas().numpy()
