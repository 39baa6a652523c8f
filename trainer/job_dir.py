"""What a run leaves in its job_dir, file by file; every file is whole or absent."""

import csv
import io
import json
from typing import NamedTuple

import h5py
import keras
import numpy as np

from trainer import examples, storage
from trainer.errors import UserError
from trainer.examples import BadFile, Examples, Split

HISTORY_COLUMNS = (
    *("epoch", "stage", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"),
    *("seconds", "images_per_second"),
)
TIME_COLUMNS = (
    *("epoch", "stage", "input_wait_seconds", "compute_seconds", "validation_seconds", "saving_seconds"),
    *("images_per_second", "ceiling_images_per_second"),
)
PREDICTION_COLUMNS = ("path", "label", "predicted", "probability", "label_probability")


class JobDir(NamedTuple):
    """The paths below one job_dir, local or gs://."""

    root: str

    @property
    def config(self) -> str:
        """Every flag, what `auto` became, the versions."""
        return f"{self.root}/config.json"

    @property
    def labels(self) -> str:
        """The classes, one per line."""
        return f"{self.root}/labels.txt"

    @property
    def metrics(self) -> str:
        """The figures of the best weights; written last."""
        return f"{self.root}/metrics.json"

    @property
    def best_weights(self) -> str:
        """The best weights so far."""
        return f"{self.root}/best.weights.h5"

    @property
    def checkpoints(self) -> str:
        """All that a resume needs."""
        return f"{self.root}/checkpoints"

    @property
    def exports(self) -> str:
        """The model for other runtimes than TensorFlow."""
        return f"{self.root}/exports"

    def write_split(self, sides: Split, class_names: tuple[str, ...]) -> None:
        """Writes split.csv and labels.txt (one class per line, in the order of the network's outputs)."""
        text = io.StringIO()
        examples.write_split(text, sides, class_names)
        storage.write_whole(f"{self.root}/split.csv", text.getvalue())
        storage.write_whole(self.labels, "".join(f"{name}\n" for name in class_names))

    def read_class_names(self) -> tuple[str, ...]:
        """The classes in labels.txt. Raises UserError if it is not there."""
        contents = storage.read(self.labels)
        if contents is None:
            raise UserError(f"{self.labels} is not there, which names the classes: restore it, or train again.")
        return tuple(contents.decode().removesuffix("\n").split("\n"))

    def write_bad_files(self, bad_files: list[BadFile]) -> None:
        """Writes bad_files.csv: path and reason of each file that was left out."""
        storage.write_whole(f"{self.root}/bad_files.csv", _csv_text(("path", "reason"), bad_files))

    def write_history(self, rows: list[dict]) -> None:
        """Writes history.csv, one row per epoch."""
        storage.write_whole(
            f"{self.root}/history.csv", _csv_text(HISTORY_COLUMNS, [[row[c] for c in HISTORY_COLUMNS] for row in rows])
        )

    def write_times(self, rows: list[dict]) -> None:
        """Writes time.csv: where the time of each epoch went, to the millisecond."""
        values = [[row[c] if c in ("epoch", "stage") else round(row[c], 3) for c in TIME_COLUMNS] for row in rows]
        storage.write_whole(f"{self.root}/time.csv", _csv_text(TIME_COLUMNS, values))

    def write_predictions(self, shown: Examples, probabilities: np.ndarray, class_names: tuple[str, ...]) -> None:
        """Writes predictions.csv: what the best network says of each validation picture; probabilities [V, C]."""
        write_predictions(f"{self.root}/predictions.csv", shown, probabilities, class_names)

    def write_heatmaps(self, epoch: int | None, maps: dict[str, np.ndarray]) -> None:
        """Writes gradcam.json: where the network of that epoch looked, uint8 [h, w] by picture; None: of no training."""
        values = {"epoch": epoch, "maps": {path: heat.tolist() for path, heat in maps.items()}}
        storage.write_whole(f"{self.root}/gradcam.json", json.dumps(values, ensure_ascii=False) + "\n")


def write_predictions(path: str, shown: Examples, probabilities: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Writes one row per labelled picture: PREDICTION_COLUMNS; probabilities float32 [N, C]."""
    predicted = probabilities.argmax(axis=1)
    rows = [
        (name, class_names[label], class_names[guess], f"{row[guess]:.6g}", f"{row[label]:.6g}")
        for name, label, guess, row in zip(shown.paths, shown.labels, predicted, probabilities, strict=True)
    ]
    storage.write_whole(path, _csv_text(PREDICTION_COLUMNS, rows))


def _csv_text(columns: tuple[str, ...], rows: list) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


_HDF5_BYTES_PER_ARRAY = 8192  # at most, beside its values: a file of 320 of them holds 1,600 each


class Best(NamedTuple):
    """The best validation so far: its epoch (from 1 over both stages), accuracy, loss, probabilities float32 [V, C]."""

    epoch: int
    val_accuracy: float
    val_loss: float
    probabilities: np.ndarray
    is_readable: np.ndarray


NONE_YET = Best(0, -1.0, float("inf"), np.zeros((0, 0), np.float32), np.zeros(0, bool))


def write_best(path: str, model: keras.Model, best: Best) -> None:
    """Writes best.weights.h5: the model's weights, and with them, in one file, the validation that they reached."""
    arrays = [*model.get_weights(), best.probabilities, best.is_readable]
    with storage.whole(path) as temporary:
        storage.reserve(temporary, sum(array.nbytes + _HDF5_BYTES_PER_ARRAY for array in arrays))
        model.save_weights(temporary)
        with h5py.File(temporary, "a") as file:
            group = file.create_group("validation")
            group.attrs.update(epoch=best.epoch, val_accuracy=best.val_accuracy, val_loss=best.val_loss)
            group["probabilities"], group["is_readable"] = best.probabilities, best.is_readable


def read_best(path: str) -> Best:
    """The validation that best.weights.h5 tells of, NONE_YET where there is no such file."""
    contents = storage.read(path)
    if contents is None:
        return NONE_YET
    with h5py.File(io.BytesIO(contents), "r") as file:
        group = file["validation"]
        attributes = group.attrs
        return Best(
            int(attributes["epoch"]),
            float(attributes["val_accuracy"]),
            float(attributes["val_loss"]),
            group["probabilities"][:],
            group["is_readable"][:],
        )
