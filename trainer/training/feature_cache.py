"""Features of the frozen backbone: computed once on all replicas and cached on disk, in parts.

Shapes: N examples, F features, b of N in a batch.
"""

import hashlib
import io
import re
import time
from collections.abc import Callable

import numpy as np
from absl import logging

from trainer.data.input_pipeline import page_aligned
from trainer.runtime import agreement
from trainer.runtime.devices import Devices
from trainer.storage import files
from trainer.training.inference import ModelOutputs
from trainer.training.interruption import TrainingInterrupted

# A part is written when it has this many examples (160 MB at F = 2,048) or after this time: the most that a killed job
# computes again.
EXAMPLES_PER_PART = 20_000
SECONDS_PER_PART = 30.0

# (start, stop, on_batch) -> the features of those examples; calls on_batch with those of each batch, in order.
Compute = Callable[[int, int, Callable[[ModelOutputs], None]], ModelOutputs]


def cache_key(*parts: object) -> str:
    """A short name for features that depend on `parts` alone: content hashes, weights, image size, precision."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_or_compute(
    directory: str, name: str, num_examples: int, compute: Compute, *, is_chief: bool, devices: Devices
) -> ModelOutputs:
    """Features float32 [N, F] and bool [N], false where an image could not be read, loaded from `directory` or computed.

    The chief writes each part when it is complete, so that no restart and no other job with the same `name` computes it
    again. All workers compute the same examples together. Raises OSError and TrainingInterrupted.
    """
    parts = _read_parts(directory, name, num_examples)
    gaps = _gaps(parts, num_examples)
    if agreement.find_mismatched_replica(repr(gaps), devices) is not None:
        logging.info("Not all workers have the features of the same images (--cache_dir): computing all of them.")
        parts, gaps = {}, [(0, num_examples)]
    for start, stop in gaps:
        writer = _PartWriter(directory, name, start) if is_chief else None
        try:
            parts[start] = compute(start, stop, writer.add if writer else lambda outputs: None)
        except TrainingInterrupted:
            if writer:
                writer.write()
                num_kept = sum(len(part.values) for part in _read_parts(directory, name, num_examples).values())
                logging.info("Features of %d of %d images are kept in %s.", num_kept, num_examples, directory)
            raise
        if writer:
            writer.write()
    return _joined(parts)


def load(directory: str, name: str, num_examples: int) -> ModelOutputs | None:
    """As load_or_compute, but None if a part is missing or damaged. Raises OSError."""
    parts = _read_parts(directory, name, num_examples)
    return None if _gaps(parts, num_examples) else _joined(parts)


def _joined(parts: dict[int, ModelOutputs]) -> ModelOutputs:
    """All parts in order. Empties `parts`, so that the memory never holds two copies of all features."""
    num_examples = sum(len(part.values) for part in parts.values())
    starts = sorted(parts)
    if len(starts) == 1:
        return parts.pop(starts[0])
    values = page_aligned((num_examples, parts[starts[0]].values.shape[1]), np.float32)
    is_readable = np.empty(num_examples, bool)
    for start in starts:
        part = parts.pop(start)
        rows = slice(start, start + len(part.values))
        values[rows], is_readable[rows] = part
    return ModelOutputs(values, is_readable)


class _PartWriter:
    """Collects the features of consecutive examples, from `start` on, and writes them in parts."""

    def __init__(self, directory: str, name: str, start: int):
        self._directory, self._name, self._start = directory, name, start
        self._batches: list[ModelOutputs] = []
        self._written_at = time.monotonic()

    def add(self, outputs: ModelOutputs) -> None:
        """Adds the features [b, F] of a batch."""
        self._batches.append(outputs)
        num_pending = sum(len(batch.values) for batch in self._batches)
        if num_pending >= EXAMPLES_PER_PART or time.monotonic() - self._written_at >= SECONDS_PER_PART:
            self.write()

    def write(self) -> None:
        """Writes a part with the batches since the last one."""
        if not self._batches:
            return
        values = np.concatenate([batch.values for batch in self._batches])
        is_readable = np.concatenate([batch.is_readable for batch in self._batches])
        buffer = io.BytesIO()
        np.savez(buffer, values=values, is_readable=is_readable)
        files.make_directory(self._directory)
        files.atomic_write(files.join(self._directory, _part_name(self._name, self._start)), buffer.getbuffer())
        self._start, self._batches, self._written_at = self._start + len(values), [], time.monotonic()


def _part_name(name: str, start: int) -> str:
    return f"features-{name}-{start:09d}.npz"


def _read_parts(directory: str, name: str, num_examples: int) -> dict[int, ModelOutputs]:
    """The undamaged parts by the index of their first example; none overlaps another."""
    pattern = re.compile(rf"features-{name}-(\d{{9}})\.npz")
    starts = sorted(int(match[1]) for match in map(pattern.fullmatch, files.list_names(directory)) if match)
    parts: dict[int, ModelOutputs] = {}
    end = 0  # of the last part
    for start in starts:
        part = _read(files.join(directory, _part_name(name, start)))
        if part and start >= end and start + len(part.values) <= num_examples:
            parts[start] = part
            end = start + len(part.values)
    return parts


def _gaps(parts: dict[int, ModelOutputs], num_examples: int) -> list[tuple[int, int]]:
    """First and last example, exclusive, of each range that no part has."""
    ends = [0, *(start + len(parts[start].values) for start in sorted(parts))]
    starts = [*sorted(parts), num_examples]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def _read(path: str) -> ModelOutputs | None:
    """The part in a file; None if the file does not exist or is damaged."""
    contents = files.read(path)
    if contents is None:
        return None
    try:
        with np.load(io.BytesIO(contents)) as archive:
            return ModelOutputs(archive["values"], archive["is_readable"])
    except files.CORRUPT_ARCHIVE_ERRORS:
        return None
