"""Judges a trained model on a labelled folder, one sub-folder per class, and draws the same report as a run.

    python -m trainer.evaluate --model_dir=J/saved_model --data_dir=unseen --report_dir=R
    python -m trainer.evaluate --model_dir=J1/saved_model,J2/saved_model --data_dir=unseen --report_dir=R
        judges several on the same pictures, and tells whether one is better

Leaves metrics.json, predictions.csv, bad_files.csv, labels.txt, config.json, index.html and its pictures in R; of
several models in R/model_1, R/model_2, ..., and in R comparison.json and a page that sets them side by side.
"""

import functools
import platform
import sys
import time
from typing import NamedTuple

import numpy as np
from absl import flags, logging

from trainer import cli
from trainer.data import file_checks, shards, tfds
from trainer.data.dataset import Examples, Folder, read_folder
from trainer.data.listing import BadFile
from trainer.errors import UserError
from trainer.serving import batch
from trainer.serving.classifier import Classifier, classify, load
from trainer.storage import files


class Evaluation(NamedTuple):
    """What a model says of the pictures that it could read; probabilities float32 [N, C]."""

    classifier: Classifier
    shown: Examples
    probabilities: np.ndarray
    bad_files: list[BadFile]


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string("model_dir", "", "A saved_model folder, or the job_dir of a run; several with commas between.")
    flags.DEFINE_string("data_dir", "", "Folder with one sub-folder per class, named as the model's; or tfds:NAME.")
    flags.DEFINE_string("report_dir", "", "Folder for the report.")
    flags.DEFINE_float("max_bad_fraction", 0.01, "Share of unreadable files above which it ends with an error.",
                       lower_bound=0, upper_bound=1)  # fmt: skip
    flags.DEFINE_integer("batch_size", 32, "Pictures per call of the network.", lower_bound=1)


def main(arguments: list[str]) -> None:
    """Asks the model, or each of several, for every picture and writes what came of it."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --data_dir={arguments[0]} if it is the folder.")
    cli.require("model_dir", "data_dir", "report_dir")
    model_dirs = [path.strip().rstrip("/") for path in flags.FLAGS.model_dir.split(",") if path.strip()]
    twice = [path for path in model_dirs if model_dirs.count(path) > 1]
    if twice:
        raise UserError(f"--model_dir names {twice[0]} more than once: name different models.")
    with tfds.as_folder(flags.FLAGS.data_dir) as data_dir:
        _evaluate_all(model_dirs, data_dir, flags.FLAGS.report_dir)


def _evaluate_all(model_dirs: list[str], data_dir: str, report_dir: str) -> None:
    folder = read_folder(data_dir, max_bad_fraction=flags.FLAGS.max_bad_fraction)
    cli.import_tensorflow()
    if len(model_dirs) == 1:
        _evaluate_and_report(model_dirs[0], data_dir, folder, report_dir)
        return
    from trainer.reporting import comparison

    names = [f"model_{number}" for number in range(1, len(model_dirs) + 1)]
    for name, model_dir in zip(names, model_dirs, strict=True):
        _evaluate_and_report(model_dir, data_dir, folder, f"{report_dir}/{name}")
    for pair in comparison.write(report_dir, names)["pairs"]:
        logging.info(
            "Models %d and %d: only the first right %d, only the second %d, p = %.2g (McNemar, exact): %s.",
            *(pair["first"] + 1, pair["second"] + 1, pair["only_first"], pair["only_second"], pair["p_value_holm"]),
            "they differ" if pair["is_significant"] else "these pictures do not tell them apart",
        )
    logging.info("Side by side: %s/index.html", report_dir)


def _evaluate_and_report(model_dir: str, data_dir: str, folder: Folder, report_dir: str) -> None:
    started = time.monotonic()
    evaluation = _evaluate(model_dir, data_dir, folder)
    _write(evaluation, model_dir, data_dir, report_dir, started)


def _evaluate(model_dir: str, data_dir: str, folder: Folder) -> Evaluation:
    max_bad_fraction = flags.FLAGS.max_bad_fraction
    classifier = load(model_dir)
    shown = _with_labels_of(classifier.class_names, folder.class_names, folder.examples, data_dir)
    options = {"batch_size": flags.FLAGS.batch_size, "progress": sys.stderr.isatty(), "total": len(shown)}
    read = functools.partial(shards.read, data_dir)
    answers = list(batch.predict(classifier, shown.paths.tolist(), **options, read=read))
    is_readable = np.array([not answer.error for answer in answers])
    unreadable = [BadFile(shown.paths[i], answers[i].error) for i in np.flatnonzero(~is_readable)]
    bad_files = [*folder.bad_files, *unreadable]
    total = len(shown) + len(folder.bad_files)
    file_checks.check_bad_fraction(len(bad_files), total, bad_files[:1], max_bad_fraction)
    probabilities = np.stack([answer.probabilities for answer in answers if answer.probabilities is not None])
    return Evaluation(classifier, shown.take(is_readable), probabilities, bad_files)


def _write(evaluation: Evaluation, model_dir: str, data_dir: str, report_dir: str, started: float) -> None:
    """Writes the files of one model, and draws its report from them."""
    import tensorflow as tf

    from trainer.artifacts import run_record
    from trainer.artifacts.job_dir import JobDir, write_class_names
    from trainer.artifacts.metrics import validation_metrics
    from trainer.reporting import report

    classifier, shown, probabilities, bad_files = evaluation
    class_names = classifier.class_names
    paths = JobDir(report_dir)
    files.make_directory(paths.root)
    write_class_names(paths.labels, class_names)
    values = {"data_dir": data_dir, "report_dir": report_dir, "max_bad_fraction": flags.FLAGS.max_bad_fraction}
    versions = {"tensorflow": tf.__version__, "python": platform.python_version()}
    paths.write_config(
        {"flags": {"model_dir": model_dir, **values}, "defaults": {}, "resolved": {}, "versions": versions}
    )
    paths.write_bad_files(bad_files)
    paths.write_predictions(shown, probabilities, class_names)
    metrics = {
        **validation_metrics(shown.labels, probabilities, class_names),
        "validation_images": len(shown),
        "bad_images": len(bad_files),
        "seconds": round(time.monotonic() - started, 1),
    }
    paths.write_metrics(metrics)
    paths.write_heatmaps(None, _heatmaps(classifier, data_dir, run_record.read(report_dir).shown_paths))
    report.write(paths.root, report_dir=paths.root)
    accuracy = metrics["val_accuracy"]
    logging.info("%s: accuracy %.4f on %d images: %s/index.html", model_dir, accuracy, len(shown), report_dir)


def _heatmaps(classifier: Classifier, data_dir: str, paths: list[str]) -> dict[str, np.ndarray]:
    """Where the model looked, uint8 [h, w] by path; {} of models that cannot tell."""
    if classifier.explain is None:
        return {}
    images = [(path, shards.read(data_dir, path) or b"") for path in paths]
    answers = classify(classifier, images, explain=True)
    return {
        answer.path: np.round(255 * answer.heatmap).astype(np.uint8) for answer in answers if answer.heatmap is not None
    }


def _with_labels_of(model_names: tuple[str, ...], names: tuple[str, ...], shown: Examples, data_dir: str) -> Examples:
    unknown = [name for name in names if name not in model_names]
    if unknown:
        raise UserError(
            f"{data_dir} has the class {unknown[0]!r}, but the model knows {', '.join(map(repr, model_names))}: rename "
            "the folder or take it out."
        )
    index = np.array([model_names.index(name) for name in names], np.int32)
    return Examples(shown.paths, index[shown.labels], shown.hashes)


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
