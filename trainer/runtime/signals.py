"""SIGTERM and SIGINT: the first one asks the job to save and exit, the second one exits at once."""

import os
import signal
import socket
import threading
import time
from types import FrameType

from absl import logging


class StopRequest:
    """Whether the job is asked to stop, and since when."""

    def __init__(self) -> None:
        self._arrived_at: float | None = None

    def set(self) -> None:
        """Asks the job to save and to stop."""
        self._arrived_at = self._arrived_at or time.monotonic()

    def is_set(self) -> bool:
        """Whether the job is asked to stop."""
        return self._arrived_at is not None

    @property
    def arrived_at(self) -> float | None:
        """When the job was asked to stop, in seconds of time.monotonic; None if it was not."""
        return self._arrived_at

    def listen(self) -> None:
        """Called after TensorFlow has started, which may have replaced the handlers of signals."""


class StopSignal(StopRequest):
    """A StopRequest by SIGTERM or SIGINT. `exit_code` is that of a process which a second signal ends at once.

    A thread receives the signals. Python calls a handler between two instructions of the main thread, so it would never
    call one while TensorFlow waits in that thread for a worker that is gone.
    """

    def __init__(self, *, exit_code: int) -> None:
        super().__init__()
        self._exit_code = exit_code
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # A forked process must not report its own signals to this one.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._receive, name="signals", daemon=True).start()
        self.listen()

    def listen(self) -> None:
        """Installs the handlers.

        Call it again after TensorFlow has started: its coordination service for several hosts installs one for SIGTERM.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave_to_thread)

    def _receive(self) -> None:
        while True:
            for number in self._reader.recv(64):  # Python writes the number of each signal
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        if self.is_set():
            os._exit(self._exit_code)
        self.set()
        logging.warning("%s: saving, then exiting. A second signal exits at once.", signal.Signals(number).name)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """The handler of signals that StopSignal receives on its thread: without one, the signal would end the process."""
