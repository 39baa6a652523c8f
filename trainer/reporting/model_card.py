"""The model card of a run (Mitchell et al., 2019, arXiv:1810.03993): what was measured, and what only people can say.

Written to job_dir/model_card.md from the files there; fields that nothing here can know are left to fill in.
"""

import os

from absl import logging

from trainer.artifacts import run_record
from trainer.artifacts.metrics import wilson_interval
from trainer.artifacts.run_record import RunRecord
from trainer.reporting import html
from trainer.storage import files

TO_FILL_IN = "**TO FILL IN**"


def write(job_dir: str) -> None:
    """Writes model_card.md of a finished run; one in which people have filled fields in is left as it is."""
    path = os.path.join(job_dir, "model_card.md")
    text = _text(run_record.read(job_dir))
    before = files.read(path)
    if before and before.decode("utf-8", errors="replace").count(TO_FILL_IN) < text.count(TO_FILL_IN):
        logging.warning("%s has been filled in and is left as it is; rename it to have it written anew.", path)
        return
    files.atomic_write(path, text)


def _text(run: RunRecord) -> str:
    rows = []
    assert run.scores  # it is written of finished runs
    for name, scores in zip(run.labels, run.scores.per_class, strict=True):
        support = int(scores["support"] or 0)
        found = round((scores["recall"] or 0) * support)
        interval = wilson_interval(found, support) if support else None
        rows.append({"name": _plain(name), "training": run.training[name], "recall_interval": interval, **scores})
    changed = {name: value for name, value in run.flags.items() if run.config["defaults"].get(name) != value}
    return html.render("model_card.md", run=run, classes=rows, changed=changed, plain=_plain)


def _plain(text: str) -> str:
    """A name as Markdown shows it unchanged, whatever is in it."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|~$&" else letter for letter in text)
