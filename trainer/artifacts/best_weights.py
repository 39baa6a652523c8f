"""best.weights.h5: the weights of the best epoch and, in the same file, the validation result that they reached.

Shapes: V validation images, C classes.
"""

import dataclasses
import io

import h5py
import keras
import numpy as np

from trainer.storage import files

_HDF5_BYTES_PER_ARRAY = 8192  # upper bound of the overhead of one array: a file of 320 arrays had 1,600 each


@dataclasses.dataclass(frozen=True, eq=False)
class BestEpoch:
    """The best epoch so far, counted from 1 over both stages, and its validation result.

    `probabilities` is float32 [V, C]; `is_readable` is bool [V], false for images that could not be decoded.
    """

    epoch: int
    val_accuracy: float
    val_loss: float
    probabilities: np.ndarray
    is_readable: np.ndarray


NO_EPOCH = BestEpoch(0, -1.0, float("inf"), np.zeros((0, 0), np.float32), np.zeros(0, bool))


def write(path: str, model: keras.Model, best: BestEpoch) -> None:
    """Writes the weights of `model` and the result of `best` to one atomic HDF5 file. Raises OSError."""
    arrays = [*model.get_weights(), best.probabilities, best.is_readable]
    with files.atomic_path(path) as temporary:
        files.preallocate(temporary, sum(array.nbytes + _HDF5_BYTES_PER_ARRAY for array in arrays))
        model.save_weights(temporary)
        with h5py.File(temporary, "a") as file:
            group = file.create_group("validation")
            group.attrs.update(epoch=best.epoch, val_accuracy=best.val_accuracy, val_loss=best.val_loss)
            group["probabilities"], group["is_readable"] = best.probabilities, best.is_readable


def read(path: str) -> BestEpoch:
    """The validation result in a best.weights.h5; NO_EPOCH if the file does not exist."""
    contents = files.read(path)
    if contents is None:
        return NO_EPOCH
    with h5py.File(io.BytesIO(contents), "r") as file:
        group = file["validation"]
        attributes = group.attrs
        return BestEpoch(
            epoch=int(attributes["epoch"]),
            val_accuracy=float(attributes["val_accuracy"]),
            val_loss=float(attributes["val_loss"]),
            probabilities=group["probabilities"][:],
            is_readable=group["is_readable"][:],
        )
