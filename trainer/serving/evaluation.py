"""Evaluates trained models on a labeled folder and writes a report of each, and a comparison of several; and the test set.

Shapes: N images that the model can read, C classes, [h, w] a heat map.
"""

import csv
import dataclasses
import functools
import io
import platform
import time
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import cli
from trainer.artifacts import run_record
from trainer.artifacts.job_dir import PAGE_NAME, JobDir, write_class_names
from trainer.artifacts.metrics import (
    Threshold,
    describe_accuracy,
    metrics_of_test_set,
    probability_metrics,
    threshold_for_precision,
    top_class,
    validation_metrics,
)
from trainer.data import file_checks, shards
from trainer.data.dataset import Examples, Folder
from trainer.data.listing import BadFile
from trainer.errors import UserError
from trainer.reporting import comparison, report
from trainer.serving import batch
from trainer.serving.classifier import Classifier, classify, load
from trainer.serving.exporter import FinishedRun
from trainer.storage import files

_MAX_LOGGED_CLASSES = 30


@dataclasses.dataclass(frozen=True, eq=False)
class LabeledFolder:
    """A labeled folder, what read_folder found in it, and how it is evaluated."""

    data_dir: str
    folder: Folder
    batch_size: int
    max_bad_fraction: float
    min_precision: float = 0.0  # of the answers above the thresholds that are found; 0: none are
    language: str = "en"  # of the report


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The predictions of a model for the images that it can read."""

    classifier: Classifier
    examples: Examples  # N; labels are class indices of the model
    probabilities: np.ndarray  # float32 [N, C]
    bad_files: list[BadFile]
    is_novel: np.ndarray | None  # bool [N]; None of a model without novelty


def evaluate_and_report(model_dirs: list[str], labeled: LabeledFolder, report_dir: str) -> None:
    """Writes the report of one model into `report_dir`; of several into model_1, model_2, ... below it, and a comparison.

    Raises UserError if a model lacks a class of the folder, or if more than max_bad_fraction of the files are bad.
    """
    if len(model_dirs) == 1:
        _evaluate_and_report_one(model_dirs[0], labeled, report_dir)
        return
    names = [f"model_{number}" for number in range(1, len(model_dirs) + 1)]
    for name, model_dir in zip(names, model_dirs, strict=True):
        _evaluate_and_report_one(model_dir, labeled, files.join(report_dir, name))
    for pair in comparison.write(report_dir, names)["pairs"]:
        logging.info(
            "Models %d and %d: %d images correct only with the first, %d only with the second, p = %.2g (McNemar, exact): %s.",
            pair["first"] + 1,
            pair["second"] + 1,
            pair["only_first"],
            pair["only_second"],
            pair["p_value_holm"],
            "significant difference" if pair["is_significant"] else "no significant difference",
        )
    logging.info("Comparison: %s", files.join(report_dir, PAGE_NAME))


def evaluate(model_dir: str, labeled: LabeledFolder) -> Evaluation:
    """Classifies every image of the folder once. Raises UserError as evaluate_and_report."""
    classifier, folder = load(model_dir), labeled.folder
    examples = _with_labels_of(classifier.class_names, folder.class_names, folder.examples, labeled.data_dir)
    predictions = list(
        batch.predict(
            classifier,
            examples.paths.tolist(),
            batch_size=labeled.batch_size,
            total=len(examples),
            progress=cli.shows_bars(),
            read=functools.partial(shards.read, labeled.data_dir),
        )
    )
    is_readable = np.array([not prediction.error for prediction in predictions])
    unreadable = [BadFile(prediction.path, prediction.error) for prediction in predictions if prediction.error]
    bad_files = [*folder.bad_files, *unreadable]
    total = len(examples) + len(folder.bad_files)
    file_checks.check_bad_fraction(bad_files, total, labeled.max_bad_fraction, data_dir=labeled.data_dir)
    rows = [prediction.probabilities for prediction in predictions if prediction.probabilities is not None]
    is_novel = [prediction.is_novel for prediction in predictions if prediction.probabilities is not None]
    return Evaluation(
        classifier,
        examples.take(is_readable),
        np.reshape(rows, (len(rows), len(classifier.class_names))),
        bad_files,
        is_novel=None if None in is_novel else np.array(is_novel, bool),
    )


def evaluate_test_set(run: FinishedRun, *, batch_size: int) -> tuple[dict[str, Any], list[BadFile]]:
    """The block `test` of metrics.json, by the exported model, and the test images that it cannot read.

    The block is {} if there is no test image, or none that can be read.
    """
    if not len(run.test):
        return {}, []
    folder = Folder(class_names=run.class_names, examples=run.test, bad_files=())
    labeled = LabeledFolder(data_dir=run.data_dir, folder=folder, batch_size=batch_size, max_bad_fraction=1.0)
    evaluation = evaluate(run.model_dir, labeled)
    for bad in evaluation.bad_files:
        logging.warning("Test image %s is left out: %s.", files.join(run.data_dir, bad.path), bad.reason)
    if not len(evaluation.examples):
        logging.warning("None of the %d test images can be read, so there is no test accuracy.", len(run.test))
        return {}, evaluation.bad_files
    values = metrics_of_test_set(evaluation.examples.labels, evaluation.probabilities, run.class_names)
    logging.info(
        "Test accuracy: %s, of images that neither training nor a choice has used.",
        describe_accuracy(values["correct"], values["images"]),
    )
    return values, evaluation.bad_files


def _evaluate_and_report_one(model_dir: str, labeled: LabeledFolder, report_dir: str) -> None:
    started = time.monotonic()
    evaluation = evaluate(model_dir, labeled)
    paths = JobDir(report_dir)
    files.make_directory(paths.root)
    class_names = evaluation.classifier.class_names
    write_class_names(paths.labels, class_names)
    paths.write_config(_config(model_dir, labeled, report_dir, evaluation.classifier.resize))
    paths.write_bad_files(evaluation.bad_files)
    paths.write_predictions(evaluation.examples, evaluation.probabilities, class_names)
    metrics = {
        **validation_metrics(evaluation.examples.labels, evaluation.probabilities, class_names),
        **probability_metrics(evaluation.examples.labels, evaluation.probabilities),
        "validation_images": len(evaluation.examples),
        "bad_images": len(evaluation.bad_files),
        "seconds": round(time.monotonic() - started, 1),
    }
    if evaluation.is_novel is not None:
        metrics["novelty"] = _refused(evaluation, evaluation.is_novel)
    if trained_on := _trained_on(model_dir, evaluation):
        metrics["trained_on"] = trained_on
    if labeled.min_precision:
        metrics["min_precision"] = _thresholds(evaluation, labeled.min_precision)
    paths.write_metrics(metrics)
    shown_paths = run_record.read(report_dir).shown_paths
    paths.write_heatmaps(None, _heatmaps(evaluation.classifier, labeled.data_dir, shown_paths))
    report.write(report_dir, report_dir=report_dir)
    is_correct = evaluation.probabilities.argmax(axis=1) == evaluation.examples.labels
    accuracy = describe_accuracy(int(is_correct.sum()), len(is_correct))
    logging.info("%s: %s; report: %s", model_dir, accuracy, files.join(report_dir, PAGE_NAME))


def _trained_on(model_dir: str, evaluation: Evaluation) -> dict[str, Any]:
    """How many of the images are training images of the model, by content, and the accuracy on the others.

    {} if none is, or if the split.csv of the run is neither in `model_dir` nor in the folder above it, where a job has it.
    """
    places = [model_dir, model_dir.rstrip("/").rpartition("/")[0]]
    split_csv = next(filter(None, (files.read(JobDir(place).split) for place in places)), b"")
    rows = csv.DictReader(io.StringIO(split_csv.decode("utf-8", errors="replace")))
    hashes = {row.get("content_hash") for row in rows if row.get("split") == "training"}
    is_known = np.array([content_hash in hashes for content_hash in evaluation.examples.hashes], bool)
    if not is_known.any():
        return {}
    is_correct = (evaluation.probabilities.argmax(axis=1) == evaluation.examples.labels)[~is_known]
    others = describe_accuracy(int(is_correct.sum()), len(is_correct)) if len(is_correct) else "there are none"
    logging.warning(
        "%d of these %d images were trained on, so the accuracy says little about new images. On the others: %s.",
        is_known.sum(),
        len(is_known),
        others,
    )
    return {"images": int(is_known.sum()), "others": len(is_correct), "correct_of_others": int(is_correct.sum())}


def _refused(evaluation: Evaluation, is_novel: np.ndarray) -> dict[str, Any]:
    """How many images the model refuses as none of its classes, and its accuracy on the others; None without others."""
    is_correct = evaluation.probabilities.argmax(axis=1) == evaluation.examples.labels
    answered = is_correct[~is_novel]
    return {
        "refused": int(is_novel.sum()),
        "share_refused": float(is_novel.mean()),
        "accuracy_of_others": float(answered.mean()) if len(answered) else None,
    }


def _thresholds(evaluation: Evaluation, min_precision: float) -> dict[str, Any]:
    """The thresholds of all images and of those predicted as each class, which are also logged; None where there is none."""
    predicted, probability = top_class(evaluation.probabilities)
    is_correct = predicted == evaluation.examples.labels
    names = evaluation.classifier.class_names
    chosen = {"all images": np.ones(len(predicted), bool)}
    chosen |= {f"predicted as {name}": predicted == index for index, name in enumerate(names)}
    found = [threshold_for_precision(probability[rows], is_correct[rows], min_precision) for rows in chosen.values()]
    for text, threshold in list(zip(chosen, found, strict=True))[: 1 + _MAX_LOGGED_CLASSES]:
        _log_threshold(text, threshold, min_precision)
    as_json = [dataclasses.asdict(threshold) if threshold else None for threshold in found]
    return {"required": min_precision, "all": as_json[0], "per_class": dict(zip(names, as_json[1:], strict=True))}


def _log_threshold(text: str, threshold: Threshold | None, min_precision: float) -> None:
    if threshold is None:
        logging.info("Precision %.4g, %s: no threshold has it.", min_precision, text)
    else:
        logging.info(
            "Precision %.4g, %s: from a probability of %.4f on, %d images (%.1f %%) are answered, %.1f %% of them correctly.",
            min_precision,
            text,
            threshold.threshold,
            threshold.answered,
            100 * threshold.share_answered,
            100 * threshold.precision,
        )


def _config(model_dir: str, labeled: LabeledFolder, report_dir: str, resize: str) -> dict:
    return {
        "flags": {
            "model_dir": model_dir,
            "data_dir": labeled.data_dir,
            "report_dir": report_dir,
            "max_bad_fraction": labeled.max_bad_fraction,
            "resize": resize,  # of the model; the heat maps in the report need it
            "language": labeled.language,
        },
        "defaults": {},
        "resolved": {},
        "versions": {"tensorflow": tf.__version__, "python": platform.python_version()},
    }


def _heatmaps(classifier: Classifier, data_dir: str, paths: list[str]) -> dict[str, np.ndarray]:
    """Heat maps uint8 [h, w] by path; {} of a model without heat maps."""
    if classifier.explain is None:
        return {}
    images = [(path, shards.read(data_dir, path) or b"") for path in paths]
    predictions = classify(classifier, images, explain=True)
    return {p.path: np.round(255 * p.heatmap).astype(np.uint8) for p in predictions if p.heatmap is not None}


def _with_labels_of(
    model_names: tuple[str, ...], folder_names: tuple[str, ...], examples: Examples, data_dir: str
) -> Examples:
    """The examples with class indices of the model. Raises UserError if the model lacks a class of the folder."""
    unknown = [name for name in folder_names if name not in model_names]
    if unknown:
        raise UserError(
            f"{data_dir} has the class {unknown[0]!r}, but the model has {', '.join(map(repr, model_names))}: rename "
            "the folder or remove it."
        )
    index = np.array([model_names.index(name) for name in folder_names], np.int32)
    return Examples(examples.paths, index[examples.labels], examples.hashes)
