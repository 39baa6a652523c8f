"""Runs the HTTP application on a socket until a signal arrives or the model cannot be loaded."""

import collections
import logging as python_logging
import os
import signal
import socket
import time
from collections.abc import Callable

import uvicorn
from absl import logging

from trainer.errors import UserError
from trainer.serving import connections
from trainer.serving.app import Access, Limits, ServingApp
from trainer.serving.classifier import Classifier


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError if the address cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: cannot listen there ({os.strerror(error.errno or 0)}): pass another address."
        ) from None


def run(listening: socket.socket, load: Callable[[], Classifier], limits: Limits, access: Access) -> None:
    """Serves the model that `load` returns; after SIGTERM or SIGINT, requests in progress are completed.

    Raises what `load` raised.
    """

    def stop() -> None:
        server.should_exit = True

    application = ServingApp(load, limits, access, on_failure=stop)
    server = _Server(
        uvicorn.Config(
            application.starlette(),
            http=connections.BoundedConnection,
            log_config=None,
            log_level="warning",
            access_log=False,
            backlog=connections.NUM_ACCEPTED_AT_ONCE,
            timeout_keep_alive=connections.KEEP_ALIVE_SECS,
            timeout_graceful_shutdown=2 * int(limits.timeout_secs) + 1,  # to arrive, and to be answered
        )
    )
    application.metrics.observe(
        "connections", "Open connections of clients.", lambda: len(server.server_state.connections)
    )
    logging.get_absl_handler().addFilter(LogRateLimit())
    # uvicorn handles these signals while it runs and raises them again at its end, which would end the process as killed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore_signal)
    server.run(sockets=[listening])
    if application.failure:
        raise application.failure


class _Server(uvicorn.Server):
    """A server whose kernel queue is longer than the number of connections that asyncio accepts at once.

    asyncio has one argument, `backlog`, for both.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn. Calling `listen` again changes the length of the queue."""
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(connections.QUEUE_LENGTH)


def _ignore_signal(number: int, frame: object) -> None:
    """Ends neither the process nor the server; uvicorn has done that already."""


class LogRateLimit(python_logging.Filter):
    """Drops the records of a line of code above MAX_LINES in each INTERVAL_SECS, so that clients cannot fill a disk.

    The first record of the next interval says how many were dropped.
    """

    INTERVAL_SECS = 10
    MAX_LINES = 50

    def __init__(self) -> None:
        super().__init__()
        self._interval = 0
        self._counts: collections.Counter[tuple[str, int]] = collections.Counter()

    def filter(self, record: python_logging.LogRecord) -> bool:
        """Whether the record is logged."""
        interval = int(time.monotonic() / self.INTERVAL_SECS)
        if interval != self._interval:
            dropped = sum(max(0, count - self.MAX_LINES) for count in self._counts.values())
            self._interval = interval
            self._counts.clear()
            if dropped:
                record.msg = f"({dropped} lines like earlier ones were not logged.) {record.msg}"
        address = (record.pathname, record.lineno)
        self._counts[address] += 1
        return self._counts[address] <= self.MAX_LINES
