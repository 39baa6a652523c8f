"""What the files in a job_dir say of a run: read once, for the report and the model card.

Shapes: K classes, [h, w] a heat map.
"""

import collections
import csv
import functools
import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.artifacts.metrics import (
    ClassificationMetrics,
    classification_metrics,
    expected_calibration_error,
    wilson_interval,
)
from trainer.errors import UserError
from trainer.storage import files

_MAX_MISTAKES = 24


_MAX_UNCERTAIN = 12


_MAX_PAIRS = 12


@dataclass(frozen=True)
class RunRecord:
    """The files of a job_dir; what the run has not written yet is empty."""

    job_dir: str
    config: dict[str, Any]
    labels: list[str]
    split: list[dict[str, str]]
    bad_files: list[dict[str, str]]
    history: list[dict[str, Any]]
    predictions: list[dict[str, Any]]  # with `correct`
    metrics: dict[str, Any]
    time: list[dict[str, Any]]  # seconds of each epoch by what they went to
    explained: dict[str, Any]  # `epoch` and `maps`: picture -> [h][w] of 0..255

    @functools.cached_property
    def flags(self) -> dict[str, Any]:
        """Every flag of the run."""
        return self.config["flags"]

    @functools.cached_property
    def training_rows(self) -> list[dict[str, str]]:
        """Those of split.csv that are trained on, in its order."""
        return [row for row in self.split if row["split"] != "validation"]

    @functools.cached_property
    def training(self) -> collections.Counter:
        """Training pictures of each class."""
        return collections.Counter(row["label"] for row in self.training_rows)

    @functools.cached_property
    def num_validation(self) -> int:
        """Validation pictures; of an evaluation, those that were judged."""
        return len(self.split) - len(self.training_rows) or len(self.predictions)

    @functools.cached_property
    def is_evaluation(self) -> bool:
        """Whether this is what trainer.evaluate leaves, without a training."""
        return bool(self.predictions) and not self.split and not self.history

    @functools.cached_property
    def is_running(self) -> bool:
        """Whether the run has not come to its end yet."""
        return not self.metrics and not self.is_evaluation

    @functools.cached_property
    def best(self) -> dict[str, Any]:
        """The row of history that the marks point at: of the best weights, {} before the first epoch."""
        of_metrics = [row for row in self.history if row["epoch"] == self.metrics.get("best_epoch")]
        first_best = max(self.history, key=lambda row: row["val_accuracy"], default={})  # the first of equals
        return of_metrics[0] if of_metrics else first_best

    @functools.cached_property
    def model_dir(self) -> str:
        """Where the SavedModel is, or will be."""
        return self.flags.get("model_dir") or os.path.join(self.job_dir, "saved_model")

    @functools.cached_property
    def scores(self) -> ClassificationMetrics | None:
        """Of the predictions, if there are any. Raises UserError if they are of other classes."""
        if not self.predictions:
            return None
        ids = {name: index for index, name in enumerate(self.labels)}
        unknown = {row[name] for row in self.predictions for name in ("label", "predicted")} - set(ids)
        if unknown:
            raise UserError(
                f"predictions.csv has the class {min(unknown)!r}, labels.txt has not: restore both from one run."
            )
        labels, predicted = ([ids[row[name]] for row in self.predictions] for name in ("label", "predicted"))
        return classification_metrics(labels, predicted, len(ids))

    @functools.cached_property
    def answers(self) -> tuple[list[float], list[bool]]:
        """Of each prediction its probability, and whether it was right."""
        return [row["probability"] for row in self.predictions], [row["correct"] for row in self.predictions]

    @functools.cached_property
    def calibration_error(self) -> float:
        """Expected calibration error of the predictions."""
        return expected_calibration_error(*self.answers)

    @functools.cached_property
    def verdict(self) -> dict[str, Any]:
        """Accuracy and its 95 % interval: of predictions.csv, before there is one of the best epoch so far."""
        total = len(self.predictions) or (self.num_validation if self.history else 0)
        if not total:
            return {}
        correct = sum(self.answers[1]) if self.predictions else round(self.best["val_accuracy"] * total)
        low, high = wilson_interval(correct, total)
        return {"correct": correct, "total": total, "accuracy": correct / total, "low": low, "high": high}

    @functools.cached_property
    def mistakes(self) -> list[dict[str, Any]]:
        """The predictions that were wrong, the surest first, as many as are shown."""
        wrong = (row for row in self.predictions if not row["correct"])
        return sorted(wrong, key=lambda row: -row["probability"])[:_MAX_MISTAKES]

    @functools.cached_property
    def uncertain(self) -> list[dict[str, Any]]:
        """The predictions of the lowest probability, as many as are shown."""
        return sorted(self.predictions, key=lambda row: row["probability"])[:_MAX_UNCERTAIN]

    @functools.cached_property
    def shown_paths(self) -> list[str]:
        """The pictures that a report shows, each once."""
        return list(dict.fromkeys(row["path"] for row in self.mistakes + self.uncertain))

    def heatmap(self, path: str) -> np.ndarray | None:
        """Where the network looked in that picture: uint8 [h, w]; None if that was not computed of these predictions."""
        if path not in self.explained.get("maps", {}) or self.explained["epoch"] != self.best.get("epoch"):
            return None
        return np.array(self.explained["maps"][path], np.uint8)

    @functools.cached_property
    def most_common(self) -> int:
        """The class of most validation pictures, where there are predictions."""
        scores = self.scores
        assert scores
        return max(range(len(self.labels)), key=lambda k: scores.per_class[k]["support"] or 0)

    @functools.cached_property
    def confused_pairs(self) -> list[dict[str, Any]]:
        """Which class is most often taken for which, where there are predictions."""
        assert self.scores
        confusion = self.scores.confusion
        wrong = confusion - np.diag(confusion.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [
            {"label": self.labels[i], "predicted": self.labels[j], "count": int(wrong[i, j]), "of": confusion[i].sum()}
            for i, j in pairs
            if wrong[i, j]
        ]


def read(job_dir: str) -> RunRecord:
    """The files of a run, finished or not, or of trainer.evaluate. Raises UserError if there is no run."""
    config = files.read_json(os.path.join(job_dir, "config.json"))
    if config is None:
        raise UserError(f"{job_dir} has no config.json: pass the --job_dir of a run of trainer.task.")
    split, bad_files, history, predictions, time = (
        _read_csv(os.path.join(job_dir, f"{name}.csv"))
        for name in ("split", "bad_files", "history", "predictions", "time")
    )
    for row in [*history, *time]:
        row |= {name: float(value or "nan") for name, value in row.items() if name != "stage"}
        row["epoch"] = int(row["epoch"])
    for row in predictions:
        row |= {name: float(row[name]) for name in ("probability", "label_probability")}
        row["correct"] = row["label"] == row["predicted"]
    metrics = files.read_json(os.path.join(job_dir, "metrics.json")) or {}
    planned = [config["flags"].get("head_epochs"), config["flags"].get("epochs")]
    if metrics.get("epochs", planned) != planned:  # of a run that was finished and is now going on with more epochs
        metrics = {}
    return RunRecord(
        job_dir,
        config,
        [name for name in _read_text(os.path.join(job_dir, "labels.txt")).split("\n") if name],
        *(split, bad_files, history, predictions),
        metrics,
        time,
        files.read_json(os.path.join(job_dir, "gradcam.json")) or {},
    )


def _read_csv(path: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(_read_text(path), newline="")))


def _read_text(path: str) -> str:
    """The file's text, or "" where the run has not written it yet."""
    return (files.read(path) or b"").decode("utf-8", errors="replace")
