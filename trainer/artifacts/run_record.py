"""The record of a run: the files in its job_dir, read once, for the report and the model card.

Shapes: C classes, [h, w] a heat map.
"""

import collections
import csv
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer import earlier_runs
from trainer.artifacts.job_dir import (
    BAD_FILE_COLUMNS,
    FLAGS_OF_A_RUN,
    HISTORY_COLUMNS,
    LABEL_ISSUE_COLUMNS,
    PREDICTION_COLUMNS,
    JobDir,
)
from trainer.artifacts.metrics import (
    ClassificationMetrics,
    classification_metrics,
    estimate,
    expected_calibration_error,
    wilson_interval,
)
from trainer.data import sampler
from trainer.data.splits import SPLIT_COLUMNS
from trainer.errors import UserError
from trainer.formatting import general, translate
from trainer.storage import files

_MAX_MISTAKES = 24
_MAX_UNCERTAIN = 12
_MAX_PAIRS = 12
_MAX_DOUBTFUL = 24


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a job_dir. A file that does not exist yet is empty."""

    job_dir: str
    config: dict[str, Any]
    class_names: list[str]
    split: list[dict[str, str]]
    bad_files: list[dict[str, str]]
    history: list[dict[str, Any]]
    times: list[dict[str, Any]]  # rows of time.csv
    predictions: list[dict[str, Any]]  # rows of predictions.csv with `correct`
    metrics: dict[str, Any]  # metrics.json
    label_issues: list[dict[str, Any]]  # rows of label_issues.csv
    heatmaps: dict[str, Any]  # gradcam.json: `epoch`, and `maps` from image path to [h][w] of 0..255

    @functools.cached_property
    def flags(self) -> dict[str, Any]:
        """Every flag of the run."""
        return self.config["flags"]

    @functools.cached_property
    def language(self) -> str:
        """The language of the report, one of formatting.LANGUAGES."""
        return earlier_runs.recorded(self.flags, "language")

    @functools.cached_property
    def resize(self) -> str:
        """How images become squares: stretch, pad or crop."""
        return earlier_runs.recorded(self.flags, "resize")

    @functools.cached_property
    def backbone(self) -> str:
        """The name of the network below the head."""
        return earlier_runs.recorded(self.flags, "backbone")

    @functools.cached_property
    def training_rows(self) -> list[dict[str, str]]:
        """The rows of split.csv that are trained on, in its order."""
        return [row for row in self.split if row["split"] == "training"]

    @functools.cached_property
    def training_counts(self) -> collections.Counter:
        """Number of training images by class name."""
        return collections.Counter(row["label"] for row in self.training_rows)

    @functools.cached_property
    def num_validation(self) -> int:
        """Number of validation images; of an evaluation, of evaluated images."""
        return sum(row["split"] == "validation" for row in self.split) or len(self.predictions)

    @functools.cached_property
    def num_test(self) -> int:
        """Number of test images, readable or not."""
        return sum(row["split"] == "test" for row in self.split)

    @functools.cached_property
    def test(self) -> dict[str, Any]:
        """The block `test` of metrics.json; {} without test images or before the end of the run."""
        return self.metrics.get("test", {})

    @functools.cached_property
    def is_evaluation(self) -> bool:
        """Whether these are the files of trainer.evaluate, without a training run."""
        return bool(self.predictions) and not self.split and not self.history

    @functools.cached_property
    def is_running(self) -> bool:
        """Whether the run is not finished."""
        return not self.metrics and not self.is_evaluation

    @functools.cached_property
    def head_epochs(self) -> int:
        """Number of epochs of the head. A head that is fitted to its optimum has one."""
        planned = self.flags["head_epochs"]
        return planned if planned >= 0 else max(1, sum(row["stage"] == "head" for row in self.history))

    @functools.cached_property
    def planned_epochs(self) -> int:
        """Number of epochs of a run that is neither stopped early nor at its cost limit."""
        return self.head_epochs + self.flags["epochs"]

    @functools.cached_property
    def augment(self) -> str:
        """The strength of the augmentation: none, basic or strong."""
        return earlier_runs.augment_name(self.flags["augment"])

    @functools.cached_property
    def flips(self) -> bool:
        """Whether augmentation flips images; as far as it is known, before fine-tuning has started."""
        return self.config["resolved"].get("flips", self.flags.get("flip") != "off")

    @property
    def training_stages(self) -> list[str]:
        """What was trained, one phrase for each stage, in the language of formatting.in_language."""
        flags, stages = self.flags, []
        if flags["head_epochs"] == -1 and self.head_epochs == 1:
            stages.append(translate("a head fitted by logistic regression"))
        elif self.head_epochs:
            text = translate("%(epochs)s of the head only at learning rate %(rate)s",
                             epochs=_epochs(self.head_epochs), rate=general(flags["head_learning_rate"], 6))  # fmt: skip
            stages.append(text)
        if flags["epochs"]:
            text = translate("%(epochs)s of the whole network at learning rate %(rate)s",
                             epochs=_epochs(flags["epochs"]), rate=general(flags["learning_rate"], 6))  # fmt: skip
            if self.augment != "none":
                text += translate(", with %(strength)s augmentation", strength=self.augment)
            stages.append(text)
        return stages

    @functools.cached_property
    def best_row(self) -> dict[str, Any]:
        """The row of history.csv of the best weights; {} before the first epoch."""
        recorded = [row for row in self.history if row["epoch"] == self.metrics.get("best_epoch")]
        if recorded:
            return recorded[0]
        monitor = self.flags.get("monitor", "first_val_accuracy")
        if monitor == "val_loss":
            return min(self.history, key=lambda row: row["val_loss"], default={})
        if monitor == "first_val_accuracy":
            return max(self.history, key=lambda row: row["val_accuracy"], default={})
        return max(self.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]), default={})

    @functools.cached_property
    def model_dir(self) -> str:
        """The folder of the SavedModel, which may not exist yet."""
        return self.flags.get("model_dir") or JobDir(self.job_dir).saved_model

    @functools.cached_property
    def classification(self) -> ClassificationMetrics | None:
        """The metrics of the predictions, None without predictions. Raises UserError if their classes differ."""
        if not self.predictions:
            return None
        ids = {name: index for index, name in enumerate(self.class_names)}
        unknown = {row[column] for row in self.predictions for column in ("label", "predicted")} - set(ids)
        if unknown:
            raise UserError(
                f"{JobDir(self.job_dir).predictions} has the class {min(unknown)!r}, which is not in labels.txt: "
                "restore both files from one run."
            )
        labels, predicted = ([ids[row[column]] for row in self.predictions] for column in ("label", "predicted"))
        return classification_metrics(labels, predicted, len(ids))

    @functools.cached_property
    def top_probabilities(self) -> list[float]:
        """The probability of the predicted class, one per prediction."""
        return [row["probability"] for row in self.predictions]

    @functools.cached_property
    def is_correct(self) -> list[bool]:
        """Whether the predicted class is the label, one per prediction."""
        return [row["correct"] for row in self.predictions]

    @functools.cached_property
    def calibration_error(self) -> float:
        """Expected calibration error of the predictions."""
        return expected_calibration_error(self.top_probabilities, self.is_correct)

    @functools.cached_property
    def accuracy_estimate(self) -> dict[str, Any]:
        """Correct, total, accuracy and its 95 % interval, of predictions.csv or else the best epoch; {} before both."""
        total = len(self.predictions) or (self.num_validation if self.history else 0)
        if not total:
            return {}
        correct = sum(self.is_correct) if self.predictions else round(self.best_row["val_accuracy"] * total)
        low, high = wilson_interval(correct, total)
        return {"correct": correct, "total": total, "accuracy": correct / total, "low": low, "high": high}

    @functools.cached_property
    def estimates(self) -> list[dict[str, Any]]:
        """The accuracies with their intervals, as metrics.estimate gives them, each with its `kind`; the first leads.

        The kinds are cross_validated and, of predictions.csv or else the best epoch, validation or evaluation. Before
        there are predictions, there is no balanced accuracy.
        """
        found = []
        if headline := self.metrics.get("cross_validated"):
            found.append({**headline, "kind": "cross_validated"})
        if values := self.accuracy_estimate:
            values = {**values, "images": values["total"], "kind": "evaluation" if self.is_evaluation else "validation"}
            found.append(values | (estimate(self.classification) if self.classification else {}))
        return found

    @property
    def imbalance(self) -> str:
        """What sampler.describe_imbalance says of the images per class; "" if no class is rare, or none is known."""
        counts: dict[str, int] = self.training_counts
        if not counts and self.classification:
            supports = [int(values["support"] or 0) for values in self.classification.per_class]
            counts = {name: count for name, count in zip(self.class_names, supports, strict=True) if count}
        return sampler.describe_imbalance(counts, self.flags.get("class_weight", "none")) if counts else ""

    @functools.cached_property
    def doubtful(self) -> list[dict[str, Any]]:
        """The first label issues, each with `split`, the side of its image."""
        sides = {row["path"]: row["split"] for row in self.split}
        return [{**row, "split": sides.get(row["path"], "")} for row in self.label_issues[:_MAX_DOUBTFUL]]

    @functools.cached_property
    def look_alikes(self) -> dict[str, Any]:
        """What metrics.json says of the validation images that look like a training image; {} if it was not computed."""
        return self.metrics.get("look_alikes", {})

    @functools.cached_property
    def mistakes(self) -> list[dict[str, Any]]:
        """The first wrong predictions, most confident first."""
        wrong = (row for row in self.predictions if not row["correct"])
        return sorted(wrong, key=lambda row: -row["probability"])[:_MAX_MISTAKES]

    @functools.cached_property
    def uncertain(self) -> list[dict[str, Any]]:
        """The first predictions, lowest probability first."""
        return sorted(self.predictions, key=lambda row: row["probability"])[:_MAX_UNCERTAIN]

    @functools.cached_property
    def shown_paths(self) -> list[str]:
        """The paths of the images that the report shows, each once."""
        return list(dict.fromkeys(row["path"] for row in self.mistakes + self.uncertain))

    def heatmap(self, path: str) -> np.ndarray | None:
        """The heat map of an image, uint8 [h, w]; None if gradcam.json has none, or is of another epoch."""
        if path not in self.heatmaps.get("maps", {}) or self.heatmaps["epoch"] != self.best_row.get("epoch"):
            return None
        return np.array(self.heatmaps["maps"][path], np.uint8)

    @functools.cached_property
    def most_common_label(self) -> int:
        """The class id with the most validation images. Needs predictions."""
        classification = self.classification
        assert classification
        return max(range(len(self.class_names)), key=lambda c: classification.per_class[c]["support"] or 0)

    @functools.cached_property
    def confused_pairs(self) -> list[dict[str, Any]]:
        """The pairs of label and wrong prediction with the most images, largest first. Needs predictions."""
        assert self.classification
        confusion = self.classification.confusion
        wrong = confusion - np.diag(confusion.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [
            {
                "label": self.class_names[i],
                "predicted": self.class_names[j],
                "count": int(wrong[i, j]),
                "of": confusion[i].sum(),
            }
            for i, j in pairs
            if wrong[i, j]
        ]


def _epochs(count: int) -> str:
    return translate("1 epoch") if count == 1 else translate("%(count)s epochs", count=count)


def read(job_dir: str) -> RunRecord:
    """The record of a run, finished or not, or of trainer.evaluate. Raises UserError if there is no run, or a damaged one."""
    files.check_links(job_dir)
    paths = JobDir(job_dir)
    config = paths.read_config()
    if config is None:
        raise UserError(f"{job_dir} has no config.json: pass the --job_dir of a run of trainer.task.")
    if "report_dir" not in config["flags"]:  # not an evaluation
        paths.read_config(FLAGS_OF_A_RUN)
    metrics = paths.read_metrics() or {}
    planned = [config["flags"].get("head_epochs"), config["flags"].get("epochs")]
    if metrics.get("epochs", planned) != planned:  # a finished run that resumes with more epochs
        metrics = {}
    return RunRecord(
        job_dir=job_dir,
        config=config,
        class_names=[name for name in _read_text(paths.labels).split("\n") if name],
        split=_read_rows(paths.split, SPLIT_COLUMNS, dict),
        bad_files=_read_rows(paths.bad_files, BAD_FILE_COLUMNS, dict),
        history=_read_rows(paths.history, HISTORY_COLUMNS, _epoch_row),
        times=_read_rows(paths.time, ("epoch", "stage"), _epoch_row),  # that of an earlier version has fewer columns
        predictions=_read_rows(paths.predictions, PREDICTION_COLUMNS, _prediction_row),
        metrics=metrics,
        label_issues=_read_rows(paths.label_issues, LABEL_ISSUE_COLUMNS, _label_issue_row),
        heatmaps=files.read_json_object(paths.heatmaps) or {},
    )


def _epoch_row(row: dict[str, str]) -> dict[str, Any]:
    """A row of history.csv or time.csv with numbers; an empty cell is NaN."""
    values: dict[str, Any] = {name: value if name == "stage" else float(value or "nan") for name, value in row.items()}
    values["epoch"] = int(values["epoch"])
    return values


def _prediction_row(row: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = dict(row)
    values["probability"] = float(row["probability"])
    values["label_probability"] = float(row["label_probability"])
    values["correct"] = row["label"] == row["predicted"]
    return values


def _label_issue_row(row: dict[str, str]) -> dict[str, Any]:
    return {**row, "probability": float(row["probability"])}


def _read_rows(path: str, columns: Sequence[str], parse: Callable[[dict[str, str]], dict]) -> list[dict]:
    """The parsed rows of a CSV file. Raises UserError if it lacks one of the columns or has a row that cannot be parsed."""
    rows: list[dict] = []
    try:
        for row in csv.DictReader(io.StringIO(_read_text(path), newline="")):
            if None in row or None in row.values() or not set(columns) <= set(row):
                raise ValueError(f"expected the columns {', '.join(columns)}")
            rows.append(parse(row))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, row {len(rows) + 1}: {error}: restore the file.") from None
    return rows


def _read_text(path: str) -> str:
    """The text of the file, "" if it does not exist yet."""
    return (files.read(path) or b"").decode("utf-8", errors="replace")
