"""Features of the frozen backbone: computed once on all replicas and cached on disk, in parts.

Shapes: N examples, F features.
"""

import hashlib
import io
from collections.abc import Callable

import numpy as np

from trainer.storage import files
from trainer.training.loop import ModelOutputs

EXAMPLES_PER_PART = 20_000  # 160 MB at F = 2,048: the most that a killed job computes again


def cache_key(*parts: object) -> str:
    """A short name for features that depend on `parts` alone: content hashes, weights, image size, precision."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_or_compute(
    directory: str, name: str, num_examples: int, compute: Callable[[int, int], ModelOutputs], *, is_chief: bool
) -> ModelOutputs:
    """Features float32 [N, F] and bool [N], false where an image could not be read, loaded from `directory` or computed.

    `compute(start, stop)` returns the features of those examples. The chief writes each part when it is complete, so that
    no restart and no other job with the same `name` computes it again. Raises OSError.
    """
    parts = []
    for start in range(0, num_examples, EXAMPLES_PER_PART):
        stop = min(start + EXAMPLES_PER_PART, num_examples)
        path = files.join(directory, f"features-{name}-{start:09d}.npz")
        part = _read(path, stop - start)
        if part is None:
            part = compute(start, stop)
            if is_chief:
                files.make_directory(directory)
                buffer = io.BytesIO()
                np.savez(buffer, values=part.values, is_readable=part.is_readable)
                files.atomic_write(path, buffer.getbuffer())
        parts.append(part)
    return ModelOutputs(
        values=np.concatenate([part.values for part in parts]),
        is_readable=np.concatenate([part.is_readable for part in parts]),
    )


def _read(path: str, num_examples: int) -> ModelOutputs | None:
    """The part in a file; None if the file does not exist, is damaged or has another number of examples."""
    contents = files.read(path)
    if contents is None:
        return None
    try:
        with np.load(io.BytesIO(contents)) as archive:
            part = ModelOutputs(archive["values"], archive["is_readable"])
    except files.CORRUPT_ARCHIVE_ERRORS:
        return None
    return part if len(part.values) == num_examples else None
