"""Waits until all workers are there, before TensorFlow starts.

TensorFlow waits for them too, but without end (the chief) or for an hour, and holds Python's lock meanwhile, so that
neither a signal nor another thread can end the process.

The chief listens on its port. Each worker connects to it, sends its index, and waits for the answer, which comes when all
are connected. The chief then closes the port, and TensorFlow opens it.
"""

import contextlib
import socket
import time

from trainer.runtime.cluster import Cluster
from trainer.runtime.worker_watch import WorkerWatch

ACTIVITY = "the start of all workers"
POLL_SECS = 0.5
_GREETING = "picture-trainer worker "
_ANSWER = b"all are here\n"


def wait_for_workers(cluster: Cluster, watch: WorkerWatch) -> None:
    """Returns when every worker has called it; `watch` ends the process if that takes too long."""
    if cluster.workers == 1:
        return
    host, _, port = cluster.addresses[0].rpartition(":")
    if not cluster.is_chief:
        missing = f"worker 0 ({cluster.addresses[0]}) has not started, or waits for another one"
        with watch.waiting(ACTIVITY, lambda: missing):
            _wait_for_chief(host.strip("[]"), int(port), cluster.index)
        return
    connections: dict[int, socket.socket] = {}
    with watch.waiting(ACTIVITY, lambda: _describe_missing(cluster, connections)):
        _wait_for_others(int(port), cluster.workers, connections)


def _describe_missing(cluster: Cluster, connections: dict[int, socket.socket]) -> str:
    missing = [index for index in range(1, cluster.workers) if index not in connections]
    names = ", ".join(f"worker {index} ({cluster.addresses[index]})" for index in missing)
    return f"{names} {'has' if len(missing) == 1 else 'have'} not started"


def _wait_for_others(port: int, workers: int, connections: dict[int, socket.socket]) -> None:
    """Collects the connection of each worker in `connections`, and answers them when all are there."""
    has_ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_ipv6 else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=has_ipv6) as server:
        server.settimeout(POLL_SECS)
        while len(connections) < workers - 1:
            with contextlib.suppress(TimeoutError):
                _greet(server.accept()[0], workers, connections)
            for index in [index for index, connection in connections.items() if _is_closed(connection)]:
                connections.pop(index).close()  # that worker has ended: it will connect again when it is restarted
    for connection in connections.values():
        with contextlib.suppress(OSError), connection:
            connection.sendall(_ANSWER)


def _greet(connection: socket.socket, workers: int, connections: dict[int, socket.socket]) -> None:
    """Keeps the connection of a worker that sends its index, and closes any other."""
    connection.settimeout(POLL_SECS)
    try:
        text = connection.recv(64).decode("ascii", errors="replace")
    except OSError:
        text = ""
    number = text.removeprefix(_GREETING).strip()
    if not text.startswith(_GREETING) or not number.isdigit() or not 1 <= int(number) < workers:
        connection.close()
        return
    if int(number) in connections:
        connections[int(number)].close()
    connection.setblocking(False)
    connections[int(number)] = connection


def _is_closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _wait_for_chief(host: str, port: int, index: int) -> None:
    """Connects until the chief answers; it may start later, or start again."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(f"{_GREETING}{index}\n".encode())
            connection.settimeout(None)
            if connection.recv(len(_ANSWER)) == _ANSWER:
                return
        time.sleep(POLL_SECS)
