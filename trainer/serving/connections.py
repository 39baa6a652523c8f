"""HTTP connections that silent or slow clients cannot exhaust: timeouts, and a limit below that of file descriptors.

uvicorn has a timeout for a connection that is idle after a response, but none before the first request, and each byte of
a header stops it. Its limit of concurrency answers every path with 503.
"""

import asyncio
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# From the start of a connection to the end of the header of its first request. 20 s in Apache's mod_reqtimeout.
HEADER_TIMEOUT_SECS = 15
KEEP_ALIVE_SECS = 60  # from a response to the end of the header of the next request; 75 s in nginx
WRITE_TIMEOUT_SECS = 30  # for a client that does not read its response

# Connections that the event loop accepts at once, before any is counted. It is also the length of the kernel's queue.
BACKLOG = 64


def max_connections() -> int:
    """Half of the file descriptors that this process may open: the rest is for files, decoders, and BACKLOG."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(soft_limit, 8192) // 2)


class BoundedConnection(H11Protocol):
    """A connection that is closed if its client does not send a header, or read a response, in time.

    When there are `max_connections` of them, a new one replaces one that waits for its client: the oldest that never sent
    a request, else the oldest between two requests, else the oldest whose body has not arrived. So /health is answered
    however many silent connections there are.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._has_responded = False
        self._waiting_since = time.monotonic()
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the timer of the first header; closes another connection if there are too many."""
        super().connection_made(transport)
        self._start_header_timer(HEADER_TIMEOUT_SECS)
        # One that is aborted stays among the connections until the next round of the event loop.
        connections = [one for one in self.connections if isinstance(one, BoundedConnection) and not one._is_closing()]
        if len(connections) > max_connections():
            waiting = [one for one in connections if one._waits_for_client()]
            least_useful = min(waiting, key=lambda one: (not one._is_idle(), one._has_responded, one._waiting_since))
            least_useful.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        self._stop(self._header_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Stops the timer of the header once a whole one has arrived."""
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle and not self._is_idle():
            self._stop(self._header_timer)

    def on_response_complete(self) -> None:
        """Starts the timer of the next header. The rest of a request that was answered early does not stop it."""
        self._has_responded = True
        self._waiting_since = time.monotonic()
        self._start_header_timer(KEEP_ALIVE_SECS)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read: the timer starts when the buffer of the connection is full."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_SECS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop(self._write_timer)
        super().resume_writing()

    def _start_header_timer(self, seconds: float) -> None:
        self._stop(self._header_timer)
        self._header_timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, timer: asyncio.TimerHandle | None) -> None:
        if timer:
            timer.cancel()

    def _is_closing(self) -> bool:
        return self.transport.is_closing()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _waits_for_client(self) -> bool:
        """Whether the client has to send something: a header, or the rest of a body."""
        return self._is_idle() or self.cycle.more_body
