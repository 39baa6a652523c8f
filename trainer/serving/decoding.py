"""Decodes images in processes that are killed when one takes too long, so that no image can stop the server.

A progressive JPEG of 2 MB can keep its decoder busy for minutes, and no thread can be interrupted in it.
"""

import asyncio
import base64
import multiprocessing
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import NamedTuple

from absl import logging

# A PNG of one pixel. A process decodes it first, which initializes TensorFlow.
BLACK_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mNgYGAAAAAEAAHI6uv5AAAAAElFTkSuQmCC"
)
START_TIMEOUT_SECS = 300  # for BLACK_PIXEL: 1 s on an idle core


class DecodedImage(NamedTuple):
    """A PNG of the square that a network receives, or the reason why there is none."""

    png: bytes
    reason: str


def start_importing() -> None:
    """Starts the process from which decoders are forked; it imports TensorFlow while this one loads the model.

    A fork of this process would copy locks that threads of TensorFlow hold.
    """
    forkserver.set_forkserver_preload(["trainer.serving.decode_worker"])
    forkserver.ensure_running()


class Decoders:
    """Processes that decode to squares of `image_size` pixels, `num_processes` images at a time.

    One process more waits to replace one that is killed. `on_kill` is called, in a thread, when a process took too long
    and was killed, or has ended by itself, as one does that the kernel kills for its memory.
    """

    def __init__(
        self,
        image_size: int,
        resize: str,
        *,
        num_processes: int,
        timeout_secs: float,
        on_kill: Callable[[], None],
    ):
        self._square = (image_size, resize)
        self._graph = b""
        self._num_processes = num_processes
        self._timeout_secs = timeout_secs
        self._on_kill = on_kill
        self._threads = ThreadPoolExecutor(num_processes, "decoder")  # each waits for one process
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes: set[_Process] = set()
        self._is_stopped = False

    def start(self) -> None:
        """Starts all processes and waits until they can decode. Raises EOFError or TimeoutError if one cannot."""
        from trainer.serving import decode_worker  # imports TensorFlow

        self._graph = decode_worker.build_graph(*self._square)
        started = [self._start_process() for _ in range(self._num_processes + 1)]
        for process in started:
            process.wait_until_ready()

    def stop(self) -> None:
        """Ends all processes, without waiting for what they decode; threads that wait for them end too."""
        self._is_stopped = True
        for process in list(self._processes):
            process.kill()

    async def decode(self, contents: bytes) -> DecodedImage:
        """The image in the contents of a file. Waits for a process; cancelled while it waits, it takes none."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, contents)

    def _decode(self, contents: bytes) -> DecodedImage:
        process = self._idle.get()
        try:
            decoded = process.decode(contents, self._timeout_secs)
            self._idle.put(process)
            return decoded
        except TimeoutError:
            reason = f"cannot be decoded within {self._timeout_secs:g} seconds: save it again, or scale it down"
        except (EOFError, OSError):
            reason = "cannot be decoded: the decoder ended, perhaps for lack of memory: scale the image down"
        process.kill()
        self._processes.discard(process)
        if not self._is_stopped:
            logging.warning("An image of %d bytes %s.", len(contents), reason)
            self._on_kill()
            self._start_process()
        return DecodedImage(b"", reason)

    def _start_process(self) -> "_Process":
        process = _Process(self._graph)
        self._processes.add(process)
        self._idle.put(process)  # behind those that are ready
        if self._is_stopped:  # in the meantime
            process.kill()
        return process


class _Process:
    """One process that decodes; see decode_worker."""

    def __init__(self, graph: bytes):
        context = multiprocessing.get_context("forkserver")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_run, args=(other_end, graph), daemon=True)
        self._process.start()
        other_end.close()
        self._connection.send_bytes(BLACK_PIXEL)
        self._is_ready = False

    def wait_until_ready(self) -> None:
        if not self._is_ready:
            self._receive(START_TIMEOUT_SECS)
            self._is_ready = True

    def decode(self, contents: bytes, timeout_secs: float) -> DecodedImage:
        """Raises TimeoutError if it takes longer, EOFError or OSError if the process has ended."""
        self.wait_until_ready()
        self._connection.send_bytes(contents)
        return self._receive(timeout_secs)

    def kill(self) -> None:
        self._process.kill()  # a thread that waits for it then reads the end of the connection

    def _receive(self, timeout_secs: float) -> DecodedImage:
        if not self._connection.poll(timeout_secs):
            raise TimeoutError
        return DecodedImage(*self._connection.recv())


def _run(connection: Connection, graph: bytes) -> None:
    from trainer.serving import decode_worker  # the fork server has imported it

    decode_worker.run(connection, graph)
