"""What a resume needs, in one file per save: whole or absent, checked when read.

A save is `checkpoints/NNNNNN.npz`: named arrays and one JSON text. One file, because a bucket shows an object whole or
not at all; plain arrays, because they go back into any number of replicas; zip's CRC-32 of each array tells damage.
"""

import io
import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import storage

STATE = "state.json"
KEPT = 2  # the newest and the one before, should the newest turn out damaged


class Save(NamedTuple):
    """What was read back: arrays by name, and the state that was given as JSON-able values."""

    arrays: dict[str, np.ndarray]
    state: dict


class Saver:
    """Writes saves one after another in the background; the newest complete one outlives the writing of the next.

    The directory must be there: one that vanishes while the job runs is an error, not made again.
    """

    def __init__(self, directory: str):
        self._directory = directory
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    def save(self, arrays: dict[str, np.ndarray], state: dict) -> None:
        """Hands over host copies and returns; waits only if the save before is still being written.

        Raises what the save before raised: OSError if it could not be written.
        """
        self.wait()
        self._pending = self._pool.submit(_write, self._directory, arrays, json.dumps(state))

    def wait(self) -> None:
        """Returns when the last save is complete; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def _write(directory: str, arrays: dict[str, np.ndarray], state: str) -> None:
    numbers = _numbers(directory)
    buffer = io.BytesIO()
    everything: dict[str, Any] = {**arrays, STATE: np.frombuffer(state.encode(), np.uint8)}
    np.savez(buffer, **everything)
    storage.write_whole(_path(directory, max(numbers, default=0) + 1), buffer.getbuffer())
    for number in numbers[: 1 - KEPT or None]:
        storage.remove(_path(directory, number))


def newest(directory: str, *, set_aside: bool = True) -> Save | None:
    """The newest save that reads back undamaged, or None. A damaged one is named and renamed to *.damaged."""
    for number in reversed(_numbers(directory)):
        path = _path(directory, number)
        try:
            return _read(path)
        except storage.DAMAGE as error:
            logging.warning("%s is damaged (%s) and set aside as *.damaged; the save before it is used.", path, error)
            if set_aside:
                storage.rename(path, path + ".damaged")
    return None


def _read(path: str) -> Save:
    with np.load(io.BytesIO(storage.read(path) or b"")) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return Save(arrays, json.loads(arrays.pop(STATE).tobytes()))


def _numbers(directory: str) -> list[int]:
    stems = [name.removesuffix(".npz") for name in storage.list_names(directory) if name.endswith(".npz")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _path(directory: str, number: int) -> str:
    return f"{directory}/{number:06d}.npz"


def snapshot(variables: dict[str, tf.Variable]) -> dict[str, np.ndarray]:
    """Host copies of the variables' values, by the same names."""
    return {name: np.array(variable.numpy()) for name, variable in variables.items()}


def restore(variables: dict[str, tf.Variable], arrays: dict[str, np.ndarray]) -> None:
    """Gives each variable its value again; on every replica."""
    for name, variable in variables.items():
        variable.assign(arrays[name])


def named(prefix: str, variables: list) -> dict[str, tf.Variable]:
    """Keras variables by place and name, as in `optimizer/0003/learning_rate`.

    Not by path: Keras numbers optimizers and layers as a process makes them, and a resumed one makes fewer.
    """
    return {f"{prefix}/{i:04d}/{variable.name}": variable for i, variable in enumerate(variables)}
