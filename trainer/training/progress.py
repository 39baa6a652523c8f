"""Progress of a job: one bar per epoch on a terminal, plain log lines elsewhere."""

import shutil
import time
from typing import Any

import psutil
from absl import logging
from tqdm import tqdm

from trainer.formatting import duration
from trainer.training.cost import Cost
from trainer.training.loop import EpochTotals

SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


SLOW_INPUT_SHARE = 0.1  # of the time of the steps spent waiting for images, above which advice is logged
SLOW_INPUT_MIN_SECONDS = 10  # of an epoch; in a shorter one, the start of the input dominates


class ProgressReporter:
    """A bar that follows the training steps, with the time left for the epoch and for the job."""

    def __init__(self, *, shows_bars: bool, last_stage: str, cost: Cost):
        """`last_stage` is the name of the last stage of the job."""
        self._shows_bars, self._last_stage, self._cost = shows_bars, last_stage, cost
        self._bar: tqdm | None = None
        self._logged_at = time.monotonic()
        self._has_started = self._is_advised = False
        self._steps_done_at = time.monotonic()
        self._seconds_between_epochs = 0.0  # validation and saving, after the last epoch of this start

    def on_steps(self, stage: str, epoch: int, epochs_left: int, steps: int, totals: EpochTotals) -> None:
        """Shows the totals of the epoch so far; `epochs_left` counts the epochs of the stage after this one."""
        if not self._has_started:
            self._has_started = True
            logging.info("First steps done, %.1f s after the start.", time.time() - psutil.Process().create_time())
        self._steps_done_at = time.monotonic()
        examples, seconds = max(totals.examples, 1), max(totals.seconds, 1e-9)
        status = (
            # The time left comes first: a narrow terminal cuts off the end.
            f"{self._time_left(stage, epochs_left, steps, totals)}; loss {totals.loss / examples:.4f} "
            f"accuracy {totals.correct / examples:.4f} {totals.examples / seconds:.1f} img/s"
        )
        if self._shows_bars:
            if self._bar is None:
                self._bar = tqdm(
                    desc=f"{epoch} ({stage})",
                    total=steps,
                    initial=totals.steps,
                    bar_format="{desc}|{bar}|{n_fmt}/{total_fmt}{postfix}",  # the bar takes the remaining width
                    leave=False,
                    **_terminal_size(),
                )
            self._bar.n = totals.steps
            self._bar.set_postfix_str(status)
        elif time.monotonic() - self._logged_at >= SECONDS_BETWEEN_LINES and totals.steps < steps:
            self._logged_at = time.monotonic()
            logging.info("epoch %d (%s): step %d of %d, %s", epoch, stage, totals.steps, steps, status)

    def _time_left(self, stage: str, epochs_left: int, steps: int, totals: EpochTotals) -> str:
        """Time left and cost, extrapolated from this epoch and the last validation, without later stages."""
        seconds_per_step = max(totals.seconds, 1e-9) / totals.steps
        in_epoch = (steps - totals.steps) * seconds_per_step + self._seconds_between_epochs
        in_stage = in_epoch + epochs_left * (steps * seconds_per_step + self._seconds_between_epochs)
        over = "" if stage == self._last_stage else "over "
        left = f"epoch {duration(in_epoch)}, job {over}{duration(in_stage)} left"
        if not self._cost.price_per_hour:
            return left
        return f"{left}; cost {self._cost.total():.2f}, {over}{self._cost.total(in_stage):.2f} in the end"

    def bar(self, description: str, num_examples: int) -> tqdm:
        """A bar for one pass over images, with an `update(num_examples)`; use it as a context manager."""
        return tqdm(
            desc=description,
            total=num_examples,
            unit="img",
            leave=False,
            disable=not self._shows_bars,
            **_terminal_size(),
        )

    def on_epoch(
        self, row: dict[str, Any], times: dict[str, Any], *, is_best: bool, slow_input_advice: str = ""
    ) -> None:
        """Logs an epoch from its rows of history.csv and time.csv, in place of the bar.

        If the epoch waited for images, `slow_input_advice` is logged too, once per job.
        """
        self.close()
        self._logged_at = time.monotonic()
        self._seconds_between_epochs = self._logged_at - self._steps_done_at
        input_wait = times["input_wait_seconds"] / max(row["seconds"], 1e-9)
        logging.info(
            f"epoch {row['epoch']} ({row['stage']}): "
            f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.4f}, "
            f"val_loss {row['val_loss']:.4f}, val_accuracy {row['val_accuracy']:.4f}{' (best so far)' if is_best else ''}, "
            f"{duration(row['seconds'])}, {row['images_per_second']:.1f} img/s; input wait {100 * input_wait:.0f} %, "
            f"validation {duration(times['validation_seconds'])}, saving {duration(times['saving_seconds'])}"
        )
        self._advise_on_slow_input(slow_input_advice, input_wait=input_wait, seconds=row["seconds"])

    def _advise_on_slow_input(self, advice: str, *, input_wait: float, seconds: float) -> None:
        """Logs once per job that the devices wait for images, and what to try; `input_wait` is a fraction of `seconds`."""
        if self._is_advised or not advice or seconds < SLOW_INPUT_MIN_SECONDS or input_wait < SLOW_INPUT_SHARE:
            return
        self._is_advised = True
        logging.info("Input wait %.0f %%: the device waits for images. %s", 100 * input_wait, advice)

    def close(self) -> None:
        """Removes the bar from the terminal."""
        if self._bar:
            self._bar.close()
            self._bar = None


def _terminal_size() -> dict[str, int]:
    """The size of the terminal; 80 by 24 if a pseudo-terminal reports none, in which case tqdm would draw nothing."""
    size = shutil.get_terminal_size()
    return {"ncols": size.columns, "nrows": size.lines}
