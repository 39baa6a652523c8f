"""The model card of a run (Mitchell et al., 2019, arXiv:1810.03993): what was measured, and fields for people.

Written from the files in job_dir. Fields that no file answers are marked TO FILL IN.
"""

from typing import Any

from absl import logging

from trainer.artifacts import run_record
from trainer.artifacts.job_dir import EXTRA_DIR, JobDir
from trainer.artifacts.metrics import wilson_interval
from trainer.artifacts.run_record import RunRecord
from trainer.reporting import html
from trainer.storage import files

TO_FILL_IN = "**TO FILL IN**"


def write(job_dir: str) -> None:
    """Writes model_card.md of a finished run, and with metrics.json into the SavedModel, which may be handed over alone.

    Keeps a card in which somebody has filled in a field.
    """
    paths, run = JobDir(job_dir), run_record.read(job_dir)
    path, text = paths.model_card, _text(run)
    if files.exists(run.model_dir):
        extra = files.join(run.model_dir, EXTRA_DIR)
        files.make_directory(extra)
        files.atomic_write(files.join(extra, "model_card.md"), text)
        files.write_json(files.join(extra, "metrics.json"), run.metrics)
    existing = files.read(path)
    if existing and existing.decode("utf-8", errors="replace").count(TO_FILL_IN) < text.count(TO_FILL_IN):
        logging.warning("%s has been filled in and is kept; rename it to write a new one.", path)
        return
    files.atomic_write(path, text)


def _text(run: RunRecord) -> str:
    changed = {name: value for name, value in run.flags.items() if run.config["defaults"].get(name) != value}
    return html.render("model_card.md", run=run, classes=_class_rows(run), changed=changed, plain=_escaped)


def _class_rows(run: RunRecord) -> list[dict[str, Any]]:
    assert run.classification  # a finished run has predictions
    rows = []
    for name, metrics in zip(run.class_names, run.classification.per_class, strict=True):
        support = int(metrics["support"] or 0)
        correct = round((metrics["recall"] or 0) * support)
        interval = wilson_interval(correct, support) if support else None
        rows.append(
            {"name": _escaped(name), "training": run.training_counts[name], "recall_interval": interval, **metrics}
        )
    return rows


def _escaped(text: str) -> str:
    """A name as Markdown that shows it unchanged."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|~$&" else letter for letter in text)
