"""Ends a worker that waits for another one for too long: TensorFlow itself would wait for ever.

Several failures keep a worker waiting: another one is stopped, hangs, or has not started. TensorFlow reports a process
that is gone, but not all of these.
"""

import contextlib
import dataclasses
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

from trainer.runtime.cluster import Cluster
from trainer.runtime.signals import StopRequest

STOP_GRACE_SECS = 20.0  # after a signal, for what the workers do together; Kubernetes gives 30 s in all
CONNECT_SECS = 2.0
POLL_SECS = 0.25


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that all workers make together."""

    activity: str
    describe: Callable[[], str]
    started_at: float


class WorkerWatch:
    """Watches the calls in which this worker waits for the others, on a thread. A single worker is not watched.

    `on_timeout(message)` and `on_stop(message)` must end the process: after `timeout_secs` in one call, and if a signal
    came and the call has not ended STOP_GRACE_SECS later.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        timeout_secs: float,
        stop: StopRequest,
        on_timeout: Callable[[str], None],
        on_stop: Callable[[str], None],
    ):
        self._cluster, self._timeout_secs, self._stop = cluster, timeout_secs, stop
        self._on_timeout, self._on_stop = on_timeout, on_stop
        self._call: _Call | None = None
        if cluster.workers > 1:
            threading.Thread(target=self._watch, name="worker watch", daemon=True).start()

    @contextlib.contextmanager
    def waiting(self, activity: str, describe: Callable[[], str] | None = None) -> Iterator[None]:
        """Watches the block, a call that ends when all workers have made it.

        `activity` says which call, and `describe` which workers are missing, for the message; by default those that
        accept no connection.
        """
        self._call = _Call(activity, describe or (lambda: describe_unreachable(self._cluster)), time.monotonic())
        try:
            yield
        finally:
            self._call = None

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_SECS)
            call = self._call
            if call is None:
                continue
            now, stopped_at = time.monotonic(), self._stop.arrived_at
            if stopped_at is not None and now - max(call.started_at, stopped_at) > STOP_GRACE_SECS:
                self._on_stop(
                    f"{call.activity} has not ended {STOP_GRACE_SECS:.0f} s after the signal; {call.describe()}"
                )
            elif now - call.started_at > self._timeout_secs:
                self._on_timeout(
                    f"This worker has waited {now - call.started_at:.0f} s for the others ({call.activity}); "
                    f"{call.describe()}"
                )


def describe_unreachable(cluster: Cluster, message: str = "") -> str:
    """Which other workers are gone, as part of a sentence: those whose port refuses connections.

    If all ports answer, those that TensorFlow's error `message` names, as in /job:worker/replica:0/task:1.
    """
    others = {index: address for index, address in enumerate(cluster.addresses) if index != cluster.index}
    gone = [index for index, address in others.items() if not _answers(address)]
    named = sorted({int(number) for number in re.findall(r"/task:(\d+)", message)} & set(others))
    found = gone or named
    if not found:
        return "all of them accept connections, so one is stopped, or hangs, or is much slower"
    names = ", ".join(f"worker {index} ({others[index]})" for index in found)
    return f"{names} {'does' if len(found) == 1 else 'do'} not answer"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECS).close()
    except OSError:
        return False
    return True
