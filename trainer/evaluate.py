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

from trainer import command, examples, predict, shards, storage, tfds_folder
from trainer.errors import UserError
from trainer.examples import BadFile, Examples, Folder
from trainer.labeller import Labeller, label, load


class Judged(NamedTuple):
    """What a model says of the pictures that it could read; probabilities float32 [N, C]."""

    labeller: Labeller
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
    command.require("model_dir", "data_dir", "report_dir")
    model_dirs = [path.strip().rstrip("/") for path in flags.FLAGS.model_dir.split(",") if path.strip()]
    twice = [path for path in model_dirs if model_dirs.count(path) > 1]
    if twice:
        raise UserError(f"--model_dir names {twice[0]} more than once: name different models.")
    with tfds_folder.laid_out(flags.FLAGS.data_dir) as data_dir:
        _judge_all(model_dirs, data_dir, flags.FLAGS.report_dir)


def _judge_all(model_dirs: list[str], data_dir: str, report_dir: str) -> None:
    folder = examples.read_folder(data_dir, max_bad_fraction=flags.FLAGS.max_bad_fraction)
    command.import_tensorflow()
    if len(model_dirs) == 1:
        _judge_and_report(model_dirs[0], data_dir, folder, report_dir)
        return
    from trainer import comparison

    names = [f"model_{number}" for number in range(1, len(model_dirs) + 1)]
    for name, model_dir in zip(names, model_dirs, strict=True):
        _judge_and_report(model_dir, data_dir, folder, f"{report_dir}/{name}")
    for pair in comparison.write(report_dir, names)["pairs"]:
        logging.info(
            "Models %d and %d: only the first right %d, only the second %d, p = %.2g (McNemar, exact): %s.",
            *(pair["first"] + 1, pair["second"] + 1, pair["only_first"], pair["only_second"], pair["p_value_holm"]),
            "they differ" if pair["is_significant"] else "these pictures do not tell them apart",
        )
    logging.info("Side by side: %s/index.html", report_dir)


def _judge_and_report(model_dir: str, data_dir: str, folder: Folder, report_dir: str) -> None:
    started = time.monotonic()
    judged = _judge(model_dir, data_dir, folder)
    _write(judged, model_dir, data_dir, report_dir, started)


def _judge(model_dir: str, data_dir: str, folder: Folder) -> Judged:
    max_bad_fraction = flags.FLAGS.max_bad_fraction
    labeller = load(model_dir)
    shown = _with_labels_of(labeller.class_names, folder.class_names, folder.examples, data_dir)
    options = {"batch_size": flags.FLAGS.batch_size, "progress": sys.stderr.isatty(), "total": len(shown)}
    read = functools.partial(shards.read, data_dir)
    answers = list(predict.predict(labeller, shown.paths.tolist(), **options, read=read))
    is_readable = np.array([not answer.error for answer in answers])
    unreadable = [BadFile(shown.paths[i], answers[i].error) for i in np.flatnonzero(~is_readable)]
    bad_files = [*folder.bad_files, *unreadable]
    total = len(shown) + len(folder.bad_files)
    examples.check_bad_fraction(len(bad_files), total, bad_files[:1], max_bad_fraction)
    probabilities = np.stack([answer.probabilities for answer in answers if answer.probabilities is not None])
    return Judged(labeller, shown.take(is_readable), probabilities, bad_files)


def _write(judged: Judged, model_dir: str, data_dir: str, report_dir: str, started: float) -> None:
    """Writes the files of one model, and draws its report from them."""
    import tensorflow as tf

    from trainer import job_dir, record, report, scoring

    labeller, shown, probabilities, bad_files = judged
    class_names = labeller.class_names
    scores = scoring.classification_metrics(shown.labels, probabilities.argmax(axis=1), len(class_names))
    paths = job_dir.JobDir(report_dir)
    storage.make_directory(paths.root)
    storage.write_whole(paths.labels, "".join(f"{name}\n" for name in class_names))
    values = {"data_dir": data_dir, "report_dir": report_dir, "max_bad_fraction": flags.FLAGS.max_bad_fraction}
    versions = {"tensorflow": tf.__version__, "python": platform.python_version()}
    settings = {"flags": {"model_dir": model_dir, **values}, "defaults": {}, "resolved": {}, "versions": versions}
    storage.write_json(paths.config, settings)
    paths.write_bad_files(bad_files)
    paths.write_predictions(shown, probabilities, class_names)
    metrics = {
        "val_accuracy": scores.accuracy,
        "balanced_accuracy": scores.balanced_accuracy,
        "validation_images": len(shown),
        "bad_images": len(bad_files),
        "seconds": round(time.monotonic() - started, 1),
        "per_class": dict(zip(class_names, scores.per_class, strict=True)),
    }
    storage.write_json(paths.metrics, metrics)
    paths.write_heatmaps(None, _heatmaps(labeller, data_dir, record.read(report_dir).shown_paths))
    report.write(paths.root, report_dir=paths.root)
    logging.info("%s: accuracy %.4f on %d pictures: %s/index.html", model_dir, scores.accuracy, len(shown), report_dir)


def _heatmaps(labeller: Labeller, data_dir: str, paths: list[str]) -> dict[str, np.ndarray]:
    """Where the model looked, uint8 [h, w] by path; {} of models that cannot tell."""
    if labeller.explain is None:
        return {}
    pictures = [(path, shards.read(data_dir, path) or b"") for path in paths]
    answers = label(labeller, pictures, explain=True)
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
    command.run(main, define_flags=define_flags)
