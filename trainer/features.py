"""The frozen backbone's features of every picture: computed once, on all replicas, kept on disk in parts.

Shapes: N examples, F features.
"""

import hashlib
import io
from collections.abc import Callable

import numpy as np

from trainer import storage
from trainer.train import Outputs

EXAMPLES_PER_PART = 20_000  # 160 MB of 2,048 features: what a job that is killed meanwhile has to do again at most


def key(*parts: object) -> str:
    """A short name for features that depend on nothing but `parts`: content hashes, weights, image size, precision."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compute_once(
    directory: str, name: str, num_examples: int, compute: Callable[[int, int], Outputs], *, is_chief: bool
) -> Outputs:
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
                storage.make_directory(directory)
                buffer = io.BytesIO()
                np.savez(buffer, **part._asdict())
                storage.write_whole(path, buffer.getbuffer())
        parts.append(part)
    return Outputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _read(path: str, num_examples: int) -> Outputs | None:
    """The part in a file; None where there is none, or a damaged one, which is then written anew."""
    contents = storage.read(path)
    if contents is None:
        return None
    try:
        with np.load(io.BytesIO(contents)) as archive:
            part = Outputs(archive["values"], archive["is_readable"])
    except storage.DAMAGE:
        return None
    return part if len(part.values) == num_examples else None
