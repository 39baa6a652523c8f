"""The report, TensorBoard logs and model card of a run, updated while it trains and completed when it ends."""

import time
from typing import Any

from trainer.artifacts import run_record
from trainer.artifacts.job_dir import JobDir
from trainer.reporting import model_card, plots, report
from trainer.reporting.tensorboard import TensorBoard
from trainer.storage import files

# Drawing the page takes about a second, an epoch of the head less: not every epoch draws it.
MAX_TIME_SHARE = 0.05


class ReportWriter:
    """Writes the report and the TensorBoard logs from the files in job_dir. Only the chief has one."""

    def __init__(self, job_dir: str, board: TensorBoard):
        self._job_dir, self._board = job_dir, board
        self._next_page_at = -float("inf")

    def after_epoch(self, row: dict[str, Any], times: dict[str, Any]) -> None:
        """Logs an epoch's rows of history.csv and time.csv; draws the page unless that exceeds MAX_TIME_SHARE."""
        self._board.write({**times, **row})
        started = time.monotonic()
        if started >= self._next_page_at:
            report.write(self._job_dir, only_page=True)
            self._write_confusion_matrix()
            ended = time.monotonic()
            self._next_page_at = ended + (ended - started) / MAX_TIME_SHARE

    def finish(self) -> None:
        """Completes the logs, the report and the model card; metrics.json must exist."""
        self._write_confusion_matrix()
        self._board.finish()
        write_all(self._job_dir)

    def _write_confusion_matrix(self) -> None:
        run = run_record.read(self._job_dir)
        assert run.classification  # after an epoch there are predictions
        with plots.style():
            png = plots.png(plots.confusion_matrix(run.class_names, run.classification))
        self._board.write_image("confusion_matrix", png, epoch=run.best_row["epoch"])


def write_all(job_dir: str) -> None:
    """Writes the report and then the model card of a finished run."""
    report.write(job_dir)
    model_card.write(job_dir)


def write_missing(job_dir: str) -> None:
    """Writes the report and the model card if the run was killed before it wrote them."""
    if not files.exists(JobDir(job_dir).model_card):
        write_all(job_dir)
