"""A worker that waits for one which never comes ends by itself, or soon after a signal."""

import os
import signal
import socket
import subprocess
import sys
import time

from tests.support.processes import free_ports
from trainer.runtime import worker_watch
from trainer.runtime.cluster import Cluster, tensorflow_environment

WORKER = """
import os, sys
from trainer.runtime import cluster, rendezvous, worker_watch
from trainer.runtime.signals import StopSignal

def exit_with(code):
    def on_event(message):
        print(message, flush=True)
        os._exit(code)
    return on_event

worker_watch.STOP_GRACE_SECS = 2.0
this_worker = cluster.resolve(os.environ)
watch = worker_watch.WorkerWatch(this_worker, timeout_secs=float(sys.argv[1]), stop=StopSignal(exit_code=1),
                                 on_timeout=exit_with(75), on_stop=exit_with(143))
print("waiting", flush=True)
rendezvous.wait_for_workers(this_worker, watch)
print("all are here", flush=True)
"""


def two_workers(index: int) -> Cluster:
    addresses = tuple(f"localhost:{port}" for port in free_ports(2))
    return Cluster(workers=2, index=index, is_chief=index == 0, addresses=addresses, source="test")


def start(this_worker: Cluster, *, timeout_secs: int) -> subprocess.Popen:
    """Starts one of two workers, and not the other."""
    environment = os.environ | tensorflow_environment(this_worker)
    command = [sys.executable, "-c", WORKER, str(timeout_secs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def test_a_worker_whose_chief_never_starts_exits_after_the_timeout():
    view = two_workers(index=1)
    worker = start(view, timeout_secs=5)
    output, _ = worker.communicate(timeout=120)
    assert worker.returncode == 75
    assert f"(the start of all workers); worker 0 ({view.addresses[0]}) has not started" in output


def test_a_signal_ends_a_chief_that_waits_for_a_worker():
    view = two_workers(index=0)
    chief = start(view, timeout_secs=600)
    assert chief.stdout.readline() == "waiting\n"
    chief.send_signal(signal.SIGTERM)
    output, _ = chief.communicate(timeout=60)
    assert chief.returncode == 143, output
    assert "the start of all workers has not ended 2 s after the signal" in output
    assert f"worker 1 ({view.addresses[1]}) has not started" in output


def test_workers_meet_in_any_order_and_after_restarts():
    addresses = tuple(f"localhost:{port}" for port in free_ports(3))
    views = [
        Cluster(workers=3, index=index, is_chief=index == 0, addresses=addresses, source="test") for index in range(3)
    ]
    early = start(views[1], timeout_secs=60)
    chief = start(views[0], timeout_secs=60)
    for _ in range(2):  # a worker is killed while the chief waits for another one
        time.sleep(1.5)
        assert (early.poll(), chief.poll()) == (None, None)
        early.kill()
        early.wait()
        early = start(views[1], timeout_secs=60)
    with socket.create_connection(("localhost", int(addresses[0].rpartition(":")[2]))) as other_client:
        other_client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        workers = [chief, early, start(views[2], timeout_secs=60)]
        for worker in workers:
            output, _ = worker.communicate(timeout=60)
            assert "all are here" in output


def test_the_workers_that_are_gone_are_named():
    view = Cluster(workers=3, index=0, is_chief=True, addresses=("localhost:1", "localhost:2", "x:3"), source="test")
    assert worker_watch.describe_unreachable(view) == "worker 1 (localhost:2), worker 2 (x:3) do not answer"
