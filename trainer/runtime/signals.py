"""SIGTERM and SIGINT: the first one asks the job to save and exit, the second one exits at once."""

import os
import signal
import threading
from types import FrameType

from absl import logging


class StopSignal:
    """Remembers that SIGTERM or SIGINT arrived. `exit_code` is that of a process which a second signal ends at once."""

    def __init__(self, *, exit_code: int) -> None:
        self._arrived = threading.Event()
        self._exit_code = exit_code
        self.listen()

    def listen(self) -> None:
        """Installs the handlers.

        Call it again after TensorFlow has started: its coordination service for several hosts installs one for SIGTERM.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._arrived.is_set():
            os._exit(self._exit_code)
        self._arrived.set()
        logging.warning("%s: saving, then exiting. A second signal exits at once.", signal.Signals(number).name)

    def is_set(self) -> bool:
        """Whether the job is asked to stop."""
        return self._arrived.is_set()
