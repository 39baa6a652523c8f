"""HTTP connections that silent or slow clients cannot exhaust: timeouts, and a limit below that of file descriptors.

uvicorn has a timeout for a connection that is idle after a response, but none before the first request, and each byte of
a header stops it. Its limit of concurrency answers every path with 503.
"""

import asyncio
import itertools
import resource
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

# From the start of a connection to the end of the header of its first request. 20 s in Apache's mod_reqtimeout.
HEADER_TIMEOUT_SECS = 15
KEEP_ALIVE_SECS = 60  # from a response to the end of the header of the next request; 75 s in nginx
WRITE_TIMEOUT_SECS = 30  # for a client that does not read its response

# Connections that the event loop accepts at once, before any is counted.
NUM_ACCEPTED_AT_ONCE = 64

# Connections that the kernel keeps until they are accepted; Linux caps it at net.core.somaxconn. Beyond it, the kernel drops
# what a client sends to connect, and the client waits for a second before it tries again (RFC 6298, section 2.1).
QUEUE_LENGTH = 4096


def max_connections() -> int:
    """Half of the file descriptors that this process may open: the rest is for files, decoders and new connections."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(soft_limit, 8192) // 2)


class BoundedConnection(H11Protocol):
    """A connection that is closed if its client does not send a header, or read a response, in time.

    When there are `max_connections` of them, a new one replaces one that waits for its client: the oldest that never sent
    a request, else the one that is idle after a response for longest, else one whose body has not arrived. So /health is
    answered however many silent connections there are.
    """

    # Of the one server of this process, in order of time: the search for one to replace must not take longer the more
    # connections there are, because an attacker opens thousands in a second.
    _silent: ClassVar[dict["BoundedConnection", None]] = {}
    _idle: ClassVar[dict["BoundedConnection", None]] = {}

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the timer of the first header; closes another connection if there are too many."""
        super().connection_made(transport)
        self._start_header_timer(HEADER_TIMEOUT_SECS)
        if len(self.connections) > max_connections():
            self._least_useful()._abort()
        if not transport.is_closing():
            self._silent[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers."""
        self._stop(self._header_timer)
        self._stop(self._write_timer)
        self._wait_no_longer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Stops the timer of the header once a whole one has arrived."""
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle and not self.cycle.response_complete:
            self._stop(self._header_timer)
            self._wait_no_longer()

    def on_response_complete(self) -> None:
        """Starts the timer of the next header. The rest of a request that was answered early does not stop it."""
        self._wait_no_longer()
        self._idle[self] = None
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

    def _wait_no_longer(self) -> None:
        self._silent.pop(self, None)
        self._idle.pop(self, None)

    def _least_useful(self) -> "BoundedConnection":
        """A connection that waits for its client; this one if no other does."""
        others = (one for one in self.connections if isinstance(one, BoundedConnection) and one is not self)
        sends_body = (one for one in others if one._waits_for_body())
        return next(itertools.chain(self._silent, self._idle, sends_body), self)

    def _waits_for_body(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body

    def _abort(self) -> None:
        """Closes the connection at once; asyncio calls `connection_lost` only in the next round of its event loop."""
        self._wait_no_longer()
        self.connections.discard(self)
        self.transport.abort()
