"""Whether all workers of a job have the same flags, the same data and the same checkpoint."""

import hashlib

import numpy as np
import tensorflow as tf

from trainer.runtime.devices import Devices


def find_mismatched_replica(description: str, devices: Devices) -> int | None:
    """Index of the first replica of all workers whose `description` differs from that of replica 0, None if all agree.

    A collective operation: every worker must call it at the same point.
    """
    digest = np.frombuffer(hashlib.sha256(description.encode()).digest(), np.int64)[None]

    @tf.function
    def gather() -> tf.Tensor:
        def replica_gather() -> tf.Tensor:
            return tf.distribute.get_replica_context().all_gather(tf.constant(digest), axis=0)

        return devices.strategy.experimental_local_results(devices.strategy.run(replica_gather))[0]

    digests = gather().numpy() if devices.replicas > 1 else digest
    mismatched = np.flatnonzero((digests != digests[0]).any(axis=1))
    return int(mismatched[0]) if len(mismatched) else None
