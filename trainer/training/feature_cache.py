"""The frozen backbone's features of every picture: computed once, on all replicas, kept on disk in parts.

Shapes: N examples, F features.
"""

import hashlib
import io
from collections.abc import Callable

import numpy as np

from trainer.storage import files
from trainer.training.loop import ModelOutputs

EXAMPLES_PER_PART = 20_000  # 160 MB of 2,048 features: what a job that is killed meanwhile has to do again at most


def cache_key(*parts: object) -> str:
    """A short name for features that depend on nothing but `parts`: content hashes, weights, image size, precision."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_or_compute(
    directory: str, name: str, num_examples: int, compute: Callable[[int, int], ModelOutputs], *, is_chief: bool
) -> ModelOutputs:
    """Features float32 [N, F] and bool [N], false where a picture could not be read, from `directory` or computed.

    `compute(start, stop)` gives those of the examples from start to stop; each part is written when it is done (by the
    chief), so that neither a restart nor another trial with the same `name` computes it again.
    """
    parts = []
    for start in range(0, num_examples, EXAMPLES_PER_PART):
        stop = min(start + EXAMPLES_PER_PART, num_examples)
        path = f"{directory}/features-{name}-{start:09d}.npz"
        part = _read(path, stop - start)
        if part is None:
            part = compute(start, stop)
            if is_chief:
                files.make_directory(directory)
                buffer = io.BytesIO()
                np.savez(buffer, **part._asdict())
                files.atomic_write(path, buffer.getbuffer())
        parts.append(part)
    return ModelOutputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _read(path: str, num_examples: int) -> ModelOutputs | None:
    """The part in a file; None where there is none, or a damaged one, which is then written anew."""
    contents = files.read(path)
    if contents is None:
        return None
    try:
        with np.load(io.BytesIO(contents)) as archive:
            part = ModelOutputs(archive["values"], archive["is_readable"])
    except files.CORRUPT_ARCHIVE_ERRORS:
        return None
    return part if len(part.values) == num_examples else None
