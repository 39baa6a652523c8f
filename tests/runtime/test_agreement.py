"""A replica whose flags, data or checkpoint differ from those of the others is found."""

import os
import subprocess
import sys

import pytest
import tensorflow as tf

from tests.support.processes import free_ports
from trainer.runtime import agreement, cluster, devices

WORKER = """
import os, sys
import numpy as np
from trainer.runtime import agreement, cluster, devices
machine = devices.start(cluster.resolve(os.environ), require_gpu=False)
print(agreement.find_mismatched_replica(sys.argv[1], machine))
print(agreement.find_mismatched_replica("the same", machine))
values = np.array([[0.1, 2.5]], np.float32) if machine.first_replica == 0 else None
print(agreement.from_chief(values, (1, 2), machine).tolist())
"""


# For data and weights from the Internet; workers must not use it among themselves.
UNREACHABLE_PROXY = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
EXPECTED = "1\nNone\n[[0.10000000149011612, 2.5]]\n"


def test_a_single_replica_agrees_with_itself():
    assert agreement.find_mismatched_replica("flags", devices.start(cluster.resolve({}), require_gpu=False)) is None


@pytest.mark.slow
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="both workers would use the same GPU")
def test_two_workers_find_the_one_that_differs():
    addresses = tuple(f"localhost:{port}" for port in free_ports(2))
    workers = []
    try:
        for index, description in enumerate(["seed=0", "seed=1"]):
            view = cluster.Cluster(workers=2, index=index, is_chief=index == 0, addresses=addresses, source="test")
            environment = os.environ | UNREACHABLE_PROXY | cluster.tensorflow_environment(view)
            command = [sys.executable, "-c", WORKER, description]
            workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        assert [worker.communicate(timeout=120)[0] for worker in workers] == [EXPECTED, EXPECTED]
    finally:
        for worker in workers:
            worker.kill()
