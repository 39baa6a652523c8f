"""Checkpoints: everything that a resume needs, in one atomic file each, verified when it is read.

A checkpoint is a .npz file of named arrays and one JSON text. One file, because writing one object of a bucket is atomic.
Plain arrays, because they fit any number of replicas. The zip format has a CRC-32 per array, which detects damage.
"""

import io
import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.artifacts.job_dir import JobDir
from trainer.storage import files

STATE_NAME = "state.json"
NUM_KEPT = 2  # the newest and the one before, in case the newest is damaged


class Checkpoint(NamedTuple):
    """The contents of a checkpoint: arrays by name, and a state of values that JSON can hold."""

    arrays: dict[str, np.ndarray]
    state: dict[str, Any]


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time. The previous one is kept until the next one is complete.

    The directory must exist. It is an error if it disappears while the job runs; it is not created again.
    """

    def __init__(self, paths: JobDir):
        self._paths = paths
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    def save(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Starts to write host copies of arrays. Waits only while the previous checkpoint is being written.

        Raises the error of the previous checkpoint: OSError if it could not be written.
        """
        self.wait()
        self._pending = self._pool.submit(_write, self._paths, arrays, json.dumps(state))

    def wait(self) -> None:
        """Waits until the last checkpoint is complete; raises its error."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def _write(paths: JobDir, arrays: dict[str, np.ndarray], state: str) -> None:
    numbers = paths.checkpoint_numbers()
    buffer = io.BytesIO()
    contents: dict[str, Any] = {**arrays, STATE_NAME: np.frombuffer(state.encode(), np.uint8)}
    np.savez(buffer, **contents)
    files.atomic_write(paths.checkpoint(max(numbers, default=0) + 1), buffer.getbuffer())
    for number in numbers[: 1 - NUM_KEPT or None]:
        files.remove(paths.checkpoint(number))


def load_latest(paths: JobDir, *, rename_damaged: bool = True) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None. A damaged one is logged and renamed to *.damaged."""
    for number in reversed(paths.checkpoint_numbers()):
        path = paths.checkpoint(number)
        try:
            return _read(path)
        except files.CORRUPT_ARCHIVE_ERRORS as error:
            logging.warning("%s is damaged (%s): renamed to *.damaged, the previous checkpoint is used.", path, error)
            if rename_damaged:
                files.rename(path, path + ".damaged")
    return None


def _read(path: str) -> Checkpoint:
    with np.load(io.BytesIO(files.read(path) or b"")) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return Checkpoint(arrays, json.loads(arrays.pop(STATE_NAME).tobytes()))


def snapshot(variables: dict[str, tf.Variable]) -> dict[str, np.ndarray]:
    """Host copies of the variables' values, by the same names."""
    return {name: np.array(variable.numpy()) for name, variable in variables.items()}


def restore(variables: dict[str, tf.Variable], arrays: dict[str, np.ndarray]) -> None:
    """Assigns each variable its saved value, on every replica."""
    for name, variable in variables.items():
        variable.assign(arrays[name])


def name_variables(prefix: str, variables: list) -> dict[str, tf.Variable]:
    """Keras variables by position and name, as in `optimizer/0003/learning_rate`.

    Not by path: Keras numbers optimizers and layers in the order in which a process creates them, and a process that
    resumes a run creates fewer.
    """
    return {f"{prefix}/{i:04d}/{variable.name}": variable for i, variable in enumerate(variables)}
