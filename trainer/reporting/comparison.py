"""Comparison of several models on the same images: accuracy, calibration and paired tests.

Reads the files that trainer.evaluate wrote for each model. Images that any of the models cannot read are left out.
"""

import dataclasses
import itertools
from typing import Any

from trainer import formatting
from trainer.artifacts import run_record
from trainer.artifacts.job_dir import PAGE_NAME, JobDir
from trainer.artifacts.metrics import holm_correction, mcnemar_test, wilson_interval
from trainer.artifacts.run_record import RunRecord
from trainer.reporting import html, thumbnails
from trainer.storage import files

SIGNIFICANCE_LEVEL = 0.05
_MAX_SHOWN = 24


def write(report_dir: str, folders: list[str]) -> dict[str, Any]:
    """Compares the evaluations in `folders`, names in `report_dir`; writes comparison.json and index.html there.

    Returns the value in comparison.json.
    """
    runs = [run_record.read(files.join(report_dir, folder)) for folder in folders]
    predictions = [{row["path"]: row for row in run.predictions} for run in runs]
    paths = [path for path in predictions[0] if all(path in by_path for by_path in predictions)]
    correct = [[by_path[path]["correct"] for path in paths] for by_path in predictions]
    models = [_model(run, folder, values) for run, folder, values in zip(runs, folders, correct, strict=True)]
    result = {"images": len(paths), "models": models, "pairs": _pairs(correct)}
    files.write_json(JobDir(report_dir).comparison, result)
    differing = [path for path, values in zip(paths, zip(*correct, strict=True), strict=True) if len(set(values)) > 1]
    with formatting.in_language(runs[0].language):
        shown = thumbnails.with_images(runs[0], [predictions[0][path] for path in differing[:_MAX_SHOWN]])
        page = html.render(
            "comparison.html",
            data_dir=runs[0].flags["data_dir"],
            **result,
            num_differing=len(differing),
            shown=[(row, [by_path[row["path"]] for by_path in predictions]) for row in shown],
        )
    files.atomic_write(files.join(report_dir, PAGE_NAME), page)
    return result


def _model(run: RunRecord, folder: str, correct: list[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(correct), len(correct))
    assert run.classification  # an evaluation has predictions
    return {
        "model_dir": run.flags["model_dir"],
        "folder": folder,
        "correct": sum(correct),
        "accuracy": sum(correct) / len(correct),
        "low": low,
        "high": high,
        "balanced_accuracy": run.classification.balanced_accuracy,
        "calibration_error": run.calibration_error,
    }


def _pairs(correct: list[list[bool]]) -> list[dict[str, Any]]:
    """Each pair of models, by index, with McNemar's test and its p value corrected for the number of pairs."""
    pairs: list[dict[str, Any]] = [
        {"first": i, "second": j, **dataclasses.asdict(mcnemar_test(first, second))}
        for (i, first), (j, second) in itertools.combinations(enumerate(correct), 2)
    ]
    for pair, p_value in zip(pairs, holm_correction([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_value_holm"] = p_value
        pair["is_significant"] = p_value < SIGNIFICANCE_LEVEL
    return pairs
