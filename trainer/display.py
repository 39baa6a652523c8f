"""What can be watched while a job runs, and is left when it ends: the report, TensorBoard, the model card."""

import time

from trainer import figures, model_card, record, report, storage
from trainer.tensorboard import TensorBoard

# Drawing the page takes about a second: too long after each epoch of a head that takes less than one.
LARGEST_SHARE_OF_TIME = 0.05


class Display:
    """Draws from the files in job_dir, on the chief only."""

    def __init__(self, job_dir: str, board: TensorBoard):
        self._job_dir, self._board = job_dir, board
        self._next_drawing = -float("inf")

    def after_epoch(self, row: dict, times: dict) -> None:
        """Shows an epoch's rows of history.csv and time.csv; draws the page unless that takes over 5 % of the time."""
        self._board.write({**times, **row})
        started = time.monotonic()
        if started >= self._next_drawing:
            report.write(self._job_dir, only_page=True)
            self._draw_confusion_matrix()
            ended = time.monotonic()
            self._next_drawing = ended + (ended - started) / LARGEST_SHARE_OF_TIME

    def finish(self) -> None:
        """Draws and writes everything; metrics.json has been written."""
        self._draw_confusion_matrix()
        self._board.finish()
        draw_all(self._job_dir)

    def _draw_confusion_matrix(self) -> None:
        run = record.read(self._job_dir)
        assert run.scores  # the run is finished
        with figures.style():
            png = figures.png(figures.confusion_matrix(run.labels, run.scores))
        self._board.write_picture("confusion_matrix", png, epoch=run.best["epoch"])


def draw_all(job_dir: str) -> None:
    """Draws the report and writes the model card of a finished run, the card last."""
    report.write(job_dir)
    model_card.write(job_dir)


def draw_missing(job_dir: str) -> None:
    """Does what a run that was killed at its very end had no time for."""
    if not storage.exists(f"{job_dir}/model_card.md"):
        draw_all(job_dir)
