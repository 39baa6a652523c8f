"""The files and folders in a job_dir: their names, their columns, and how they are written. Each file is atomic.

The CSV files are for programs: names are exact, also one that a spreadsheet would take for a formula; only bytes that are
not UTF-8 are escaped (listing.escape_name). No other module spells a name in a job_dir. Imports no Keras, so that a command
reads a job_dir without delay.
Shapes: N images, C classes.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from trainer import earlier_runs
from trainer.artifacts.metrics import top_class
from trainer.data import splits
from trainer.data.dataset import Examples, Split
from trainer.data.listing import BadFile
from trainer.errors import UserError
from trainer.storage import files

HISTORY_COLUMNS = (
    "epoch",
    "stage",
    "loss",
    "accuracy",
    "val_loss",
    "val_accuracy",
    "learning_rate",
    "seconds",
    "images_per_second",
)
TIME_COLUMNS = (
    "epoch",
    "stage",
    "input_wait_seconds",
    "compute_seconds",
    "validation_seconds",
    "saving_seconds",
    "images_per_second",
    "ceiling_images_per_second",
)
PREDICTION_COLUMNS = ("path", "label", "predicted", "probability", "label_probability")
LABEL_ISSUE_COLUMNS = ("path", "label", "suggested_label", "probability")
BAD_FILE_COLUMNS = ("path", "reason")
PAGE_NAME = "index.html"  # of a report
# Of the flags in config.json, those that a model needs, and those that every run has.
FLAGS_OF_A_MODEL = ("image_size", "preprocessing", "head")
FLAGS_OF_A_RUN = (
    *FLAGS_OF_A_MODEL,
    "data_dir",
    "weights",
    "augment",
    "batch_size",
    "head_epochs",
    "epochs",
    "head_learning_rate",
    "learning_rate",
)
EXTRA_DIR = "assets.extra"  # of a SavedModel: files about it, which TensorFlow ignores
DEFAULT_NAME = "demo_job"  # the job_dir of a run without --data_dir and --job_dir


@dataclasses.dataclass(frozen=True)
class JobDir:
    """The paths in one job_dir, or in the report_dir of trainer.evaluate; local or gs://."""

    root: str

    def _path(self, name: str) -> str:
        return files.join(self.root, name)

    @property
    def config(self) -> str:
        """Every flag, the values that `auto` resolved to, the package versions. Exists once a run has started."""
        return self._path("config.json")

    @property
    def split(self) -> str:
        """Path, label, split and content hash of each image."""
        return self._path("split.csv")

    @property
    def labels(self) -> str:
        """The class names, one per line, in the order of the network's outputs."""
        return self._path("labels.txt")

    @property
    def bad_files(self) -> str:
        """Path and reason of each file that was skipped."""
        return self._path("bad_files.csv")

    @property
    def history(self) -> str:
        """One row per epoch: HISTORY_COLUMNS."""
        return self._path("history.csv")

    @property
    def time(self) -> str:
        """The seconds of each epoch by activity: TIME_COLUMNS."""
        return self._path("time.csv")

    @property
    def predictions(self) -> str:
        """The prediction of the best weights for each validation image: PREDICTION_COLUMNS."""
        return self._path("predictions.csv")

    @property
    def label_issues(self) -> str:
        """The images of which another class is more probable than their label: LABEL_ISSUE_COLUMNS."""
        return self._path("label_issues.csv")

    @property
    def heatmaps(self) -> str:
        """Grad-CAM heat maps of the images that the report shows."""
        return self._path("gradcam.json")

    @property
    def metrics(self) -> str:
        """The metrics of the best weights; written last."""
        return self._path("metrics.json")

    @property
    def best_weights(self) -> str:
        """The weights of the best epoch so far."""
        return self._path("best.weights.h5")

    @property
    def checkpoints(self) -> str:
        """Folder of the files that a resume needs: checkpoints, features, the lock."""
        return self._path("checkpoints")

    @property
    def saved_model(self) -> str:
        """Default folder of the SavedModel."""
        return self._path("saved_model")

    @property
    def exports(self) -> str:
        """Folder of the model in other formats than SavedModel."""
        return self._path("exports")

    @property
    def logs(self) -> str:
        """Default folder of the TensorBoard logs."""
        return self._path("logs")

    @property
    def report(self) -> str:
        """Folder of the report."""
        return self._path("report")

    @property
    def report_page(self) -> str:
        """The page of the report."""
        return files.join(self.report, PAGE_NAME)

    @property
    def model_card(self) -> str:
        """The model card; the last file of a finished run."""
        return self._path("model_card.md")

    @property
    def demo_images(self) -> str:
        """Folder of the demo set, which a run without --data_dir draws."""
        return self._path("demo_pictures")

    @property
    def comparison(self) -> str:
        """The comparison of several models; only in a report_dir of trainer.evaluate."""
        return self._path("comparison.json")

    def checkpoint(self, number: int) -> str:
        """The checkpoint of that number."""
        return files.join(self.checkpoints, f"{number:06d}.npz")

    def checkpoint_numbers(self) -> list[int]:
        """Numbers of the checkpoints, oldest first."""
        names = files.list_names(self.checkpoints)
        stems = [name.removesuffix(".npz") for name in names if name.endswith(".npz")]
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def has_progress(self) -> bool:
        """Whether a run has left checkpoints, damaged ones included, weights or metrics."""
        names = files.list_names(self.checkpoints)
        if any(name.split(".")[0].isdigit() for name in names):
            return True
        return files.exists(self.best_weights) or files.exists(self.metrics)

    def remove_partial_files(self) -> None:
        """Deletes the partial files of killed processes. Only the process that holds the lock may call it."""
        for directory in (self.root, self.checkpoints, self.report, self.exports):
            files.remove_partial_files(directory)

    def read_config(self, flag_names: Iterable[str] = ()) -> dict[str, Any] | None:
        """The value in config.json, None if no run has started.

        Raises UserError if it is not that of a run, or lacks one of the flags `flag_names`.
        """
        value = files.read_json_object(self.config)
        if value is None:
            return None
        for part in ("flags", "defaults", "resolved", "versions"):
            if not isinstance(value.setdefault(part, None if part == "flags" else {}), dict):
                raise UserError(f"{self.config} has no object {part!r}, as that of a run has: restore the file.")
        for name in flag_names:
            if name not in value["flags"]:
                raise UserError(f"{self.config} lacks the flag {name!r}, which every run has: restore the file.")
        for name, flag in value["flags"].items():
            if not earlier_runs.is_valid_type(name, flag):
                raise UserError(f"{self.config} has {flag!r} for the flag {name!r}: restore the file.")
        return value

    def write_config(self, value: dict[str, Any]) -> None:
        """Writes config.json."""
        files.write_json(self.config, value)

    def read_metrics(self) -> dict[str, Any] | None:
        """The value in metrics.json, None if no run has finished. Raises UserError if it is not that of a run."""
        value = files.read_json_object(self.metrics)
        if value is not None and not isinstance(value.get("val_accuracy"), float | int):
            raise UserError(f"{self.metrics} has no number 'val_accuracy', as that of a run has: restore the file.")
        return value

    def read_temperature(self) -> float:
        """What the logits of a finished run are divided by; 1 while it runs. Raises UserError if it is not a number above 0."""
        calibration = (self.read_metrics() or {}).get("calibration", {})
        value = calibration.get("temperature", 1.0) if isinstance(calibration, dict) else None
        if not isinstance(value, float | int) or not 0 < value < float("inf"):
            raise UserError(f"{self.metrics} has no temperature above 0 in 'calibration': restore the file.")
        return float(value)

    def write_metrics(self, value: dict[str, Any]) -> None:
        """Writes metrics.json."""
        files.write_json(self.metrics, value)

    def write_split(self, split: Split, class_names: tuple[str, ...]) -> None:
        """Writes split.csv and labels.txt."""
        text = io.StringIO()
        splits.write_split(text, split, class_names)
        files.atomic_write(self.split, text.getvalue())
        write_class_names(self.labels, class_names)

    def read_class_names(self) -> tuple[str, ...]:
        """The class names in labels.txt. Raises UserError if the file is missing."""
        contents = files.read(self.labels)
        if contents is None:
            raise UserError(f"{self.labels}, which names the classes, does not exist: restore it, or train again.")
        try:
            names = contents.decode().removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.labels} is not UTF-8 text ({error}): restore it, or train again.") from None
        return tuple(names)

    def write_bad_files(self, bad_files: Iterable[BadFile]) -> None:
        """Writes bad_files.csv."""
        files.atomic_write(self.bad_files, _csv_text(BAD_FILE_COLUMNS, bad_files))

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Writes history.csv, one row per epoch."""
        files.atomic_write(
            self.history, _csv_text(HISTORY_COLUMNS, ([row[c] for c in HISTORY_COLUMNS] for row in rows))
        )

    def write_times(self, rows: list[dict[str, Any]]) -> None:
        """Writes time.csv, seconds to the millisecond."""
        values = [[row[c] if c in ("epoch", "stage") else round(row[c], 3) for c in TIME_COLUMNS] for row in rows]
        files.atomic_write(self.time, _csv_text(TIME_COLUMNS, values))

    def write_predictions(self, examples: Examples, probabilities: np.ndarray, class_names: tuple[str, ...]) -> None:
        """Writes predictions.csv, one row per labeled image; `probabilities` float32 [N, C]."""
        predicted, confidence = top_class(probabilities)
        label_probability = probabilities[np.arange(len(examples)), examples.labels]
        rows = [
            (path, class_names[label], class_names[prediction], f"{top:.6g}", f"{of_label:.6g}")
            for path, label, prediction, top, of_label in zip(
                examples.paths, examples.labels, predicted, confidence, label_probability, strict=True
            )
        ]
        files.atomic_write(self.predictions, _csv_text(PREDICTION_COLUMNS, rows))

    def write_label_issues(self, examples: Examples, probabilities: np.ndarray, class_names: tuple[str, ...]) -> None:
        """Writes label_issues.csv, one row per example, in their order; `probabilities` float32 [N, C].

        `probability` is that of the label.
        """
        of_label = probabilities[np.arange(len(examples)), examples.labels]
        suggested = probabilities.argmax(axis=1)
        rows = [
            (path, class_names[label], class_names[suggestion], f"{probability:.6g}")
            for path, label, suggestion, probability in zip(
                examples.paths, examples.labels, suggested, of_label, strict=True
            )
        ]
        files.atomic_write(self.label_issues, _csv_text(LABEL_ISSUE_COLUMNS, rows))

    def write_heatmaps(self, epoch: int | None, heatmaps: dict[str, np.ndarray]) -> None:
        """Writes gradcam.json: heat maps uint8 [h, w] by image path, of the network after `epoch`, if it is known."""
        values = {"epoch": epoch, "maps": {path: heatmap.tolist() for path, heatmap in heatmaps.items()}}
        files.atomic_write(self.heatmaps, json.dumps(values, ensure_ascii=False) + "\n")


def write_class_names(path: str, class_names: Iterable[str]) -> None:
    """Writes a labels.txt: one class name per line, in the order of the network's outputs."""
    files.atomic_write(path, "".join(f"{name}\n" for name in class_names))


def _csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
