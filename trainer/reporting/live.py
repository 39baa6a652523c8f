"""What a person can watch while a job runs, and what is left when it ends: the report, TensorBoard, the model card."""

import time
from typing import Any

from trainer.artifacts import run_record
from trainer.artifacts.job_dir import JobDir
from trainer.reporting import model_card, plots, report
from trainer.reporting.tensorboard import TensorBoard
from trainer.storage import files

# Drawing the page takes about a second: too long after each epoch of a head that takes less than one.
MAX_TIME_SHARE = 0.05


class ReportWriter:
    """Writes the report and the TensorBoard logs from the files in job_dir; on the chief only."""

    def __init__(self, job_dir: str, board: TensorBoard):
        self._job_dir, self._board = job_dir, board
        self._next_page_at = -float("inf")

    def after_epoch(self, row: dict[str, Any], times: dict[str, Any]) -> None:
        """Adds an epoch's rows of history.csv and time.csv; draws the page unless that takes over 5 % of the time."""
        self._board.write({**times, **row})
        started = time.monotonic()
        if started >= self._next_page_at:
            report.write(self._job_dir, only_page=True)
            self._write_confusion_matrix()
            ended = time.monotonic()
            self._next_page_at = ended + (ended - started) / MAX_TIME_SHARE

    def finish(self) -> None:
        """Writes everything of a finished run; metrics.json has been written before."""
        self._write_confusion_matrix()
        self._board.finish()
        write_all(self._job_dir)

    def _write_confusion_matrix(self) -> None:
        run = run_record.read(self._job_dir)
        assert run.scores  # an epoch is complete, so there are predictions
        with plots.style():
            png = plots.png(plots.confusion_matrix(run.labels, run.scores))
        self._board.write_image("confusion_matrix", png, epoch=run.best["epoch"])


def write_all(job_dir: str) -> None:
    """Writes the report and then the model card of a finished run."""
    report.write(job_dir)
    model_card.write(job_dir)


def write_missing(job_dir: str) -> None:
    """Writes what a run that was killed at its very end did not write."""
    if not files.exists(JobDir(job_dir).model_card):
        write_all(job_dir)
