"""best.weights.h5: the weights of the best epoch and, in the same file, the validation result that they reached.

Shapes: V validation images, C classes.
"""

import dataclasses
import io

import h5py
import keras
import numpy as np

from trainer.errors import UserError
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
    balanced_accuracy: float
    probabilities: np.ndarray
    is_readable: np.ndarray

    def rank(self, monitor: str) -> tuple[float, ...]:
        """By which epochs are compared: the larger is the better. `monitor` is the value of --monitor."""
        return rank(
            monitor,
            val_accuracy=self.val_accuracy,
            val_loss=self.val_loss,
            balanced_accuracy=self.balanced_accuracy,
        )


NO_EPOCH = BestEpoch(0, -1.0, float("inf"), -1.0, np.zeros((0, 0), np.float32), np.zeros(0, bool))


def rank(monitor: str, *, val_accuracy: float, val_loss: float, balanced_accuracy: float) -> tuple[float, ...]:
    """By which epochs are compared: the larger is the better.

    Few validation images make equal accuracies common, and an epoch that has hardly trained may reach the highest one by
    chance. The lower loss decides between them, except for `first_val_accuracy`, where equal epochs stay equal and the
    first one is kept, as Keras' ModelCheckpoint does.
    """
    if monitor == "val_loss":
        return (-val_loss,)
    if monitor == "first_val_accuracy":
        return (val_accuracy,)
    return (balanced_accuracy if monitor == "balanced_accuracy" else val_accuracy, -val_loss)


def write(path: str, model: keras.Model, best: BestEpoch) -> None:
    """Writes the weights of `model` and the result of `best` to one atomic HDF5 file. Raises OSError."""
    arrays = [*model.get_weights(), best.probabilities, best.is_readable]
    with files.atomic_path(path) as temporary:
        files.preallocate(temporary, sum(array.nbytes + _HDF5_BYTES_PER_ARRAY for array in arrays))
        model.save_weights(temporary)
        with h5py.File(temporary, "a") as file:
            group = file.create_group("validation")
            group.attrs.update(
                epoch=best.epoch,
                val_accuracy=best.val_accuracy,
                val_loss=best.val_loss,
                balanced_accuracy=best.balanced_accuracy,
            )
            group["probabilities"], group["is_readable"] = best.probabilities, best.is_readable


def read(path: str) -> BestEpoch:
    """The validation result in a best.weights.h5; NO_EPOCH if the file does not exist. Raises UserError if it is damaged."""
    contents = files.read(path)
    if contents is None:
        return NO_EPOCH
    try:
        with h5py.File(io.BytesIO(contents), "r") as file:
            return _validation_result(file["validation"], max_bytes=len(contents))
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:  # as HDF5 and h5py raise them
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not that of a run ({reason}): restore it, or train again.") from None


def _validation_result(group: h5py.Group, *, max_bytes: int) -> BestEpoch:
    """Raises ValueError if the arrays do not fit in the file, which a damaged one may claim."""
    attributes = group.attrs
    for name in ("probabilities", "is_readable"):
        if group[name].nbytes > max_bytes:
            raise ValueError(f"{name} has {group[name].nbytes} bytes in a file of {max_bytes}")
    return BestEpoch(
        epoch=int(attributes["epoch"]),
        val_accuracy=float(attributes["val_accuracy"]),
        val_loss=float(attributes["val_loss"]),
        # Weights of earlier versions have no balanced accuracy: any later epoch is then better.
        balanced_accuracy=float(attributes.get("balanced_accuracy", -1.0)),
        probabilities=group["probabilities"][:],
        is_readable=group["is_readable"][:],
    )
