"""Several models on the same pictures, side by side: which is better, and whether the pictures can tell.

Reads what trainer.evaluate left of each model; N pictures that all of them could read.
"""

import itertools
import os
from typing import Any

from trainer.artifacts import run_record
from trainer.artifacts.metrics import holm_correction, mcnemar_test, wilson_interval
from trainer.artifacts.run_record import RunRecord
from trainer.reporting import html, thumbnails
from trainer.storage import files

SIGNIFICANT = 0.05


_MAX_SHOWN = 24


def write(report_dir: str, folders: list[str]) -> dict[str, Any]:
    """Writes comparison.json and index.html into `report_dir`, of the evaluations in its `folders`; returns the former.

    Pictures that one of the models could not read are left out of the comparison, not of that model's own report.
    """
    runs = [run_record.read(os.path.join(report_dir, folder)) for folder in folders]
    answers = [{row["path"]: row for row in run.predictions} for run in runs]
    paths = [path for path in answers[0] if all(path in others for others in answers)]
    correct = [[of_model[path]["correct"] for path in paths] for of_model in answers]
    models = [_model(run, folder, right) for run, folder, right in zip(runs, folders, correct, strict=True)]
    pairs = []
    for (i, first), (j, second) in itertools.combinations(enumerate(correct), 2):
        pairs.append({"first": i, "second": j, **mcnemar_test(first, second)._asdict()})
    for pair, p_value in zip(pairs, holm_correction([pair["p_value"] for pair in pairs]), strict=True):
        pair |= {"p_value_holm": p_value, "is_significant": p_value < SIGNIFICANT}
    result = {"images": len(paths), "models": models, "pairs": pairs}
    files.write_json(os.path.join(report_dir, "comparison.json"), result)
    differing = [path for path, right in zip(paths, zip(*correct, strict=True), strict=True) if len(set(right)) > 1]
    shown = thumbnails.with_images(runs[0], [answers[0][path] for path in differing[:_MAX_SHOWN]])
    text = html.render(
        "comparison.html",
        data_dir=runs[0].flags["data_dir"],
        **result,
        num_differing=len(differing),
        shown=[(row, [of_model[row["path"]] for of_model in answers]) for row in shown],
    )
    files.atomic_write(os.path.join(report_dir, "index.html"), text)
    return result


def _model(run: RunRecord, folder: str, correct: list[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(correct), len(correct))
    assert run.scores  # an evaluation has predictions
    return {
        **{"model_dir": run.flags["model_dir"], "folder": folder, "correct": sum(correct)},
        **{"accuracy": sum(correct) / len(correct), "low": low, "high": high},
        **{"balanced_accuracy": run.scores.balanced_accuracy, "calibration_error": run.calibration_error},
    }
