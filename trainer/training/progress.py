"""Progress of a job: one bar per epoch or phase on a terminal, plain log lines elsewhere."""

import collections
import contextlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

from absl import logging
from tqdm import tqdm

from trainer import cli, formatting
from trainer.formatting import duration
from trainer.training.cost import Cost
from trainer.training.loop import EpochTotals

SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


SLOW_INPUT_SHARE = 0.1  # of the time of the steps spent waiting for images, above which advice is logged
SLOW_INPUT_MIN_SECONDS = 10  # of an epoch; in a shorter one, the start of the input dominates

# Seconds of what follows the last epoch, over those of building the network at the start: both build graphs of the network.
CLOSING_OVER_START = 12

# What people read for the stage of history.csv.
STAGE_NAMES = {"head": "head", "all": "whole network"}
_HEADER = "epoch  stage            loss  accuracy  val_loss  val_accuracy"


class ProgressReporter:
    """Shows what the job does, with the time left for the epoch and for the job, and measures its phases."""

    def __init__(self, *, shows_bars: bool, last_stage: str, cost: Cost, started_at: float | None = None):
        """`last_stage` is the name of the last stage of the job, `started_at` when it started, in time.time(); None: now."""
        self.phase_seconds: dict[str, float] = collections.defaultdict(float)  # of this start of the job
        self._shows_bars, self._last_stage, self._cost = shows_bars, last_stage, cost
        self._started_at = time.time() if started_at is None else started_at
        self._bar: tqdm | None = None
        self._logged_at = time.monotonic()
        self._has_started = self._has_header = self._is_advised = False
        self._steps_done_at = time.monotonic()
        self._seconds_between_epochs = 0.0  # validation and saving, after the last epoch of this start
        self._first_call: tuple[int, int, float] | None = (
            None  # of a stage: epoch, steps and seconds; it builds the graph
        )

    @contextlib.contextmanager
    def phase(self, name: str, message: str = "") -> Iterator[None]:
        """Measures a part of the job other than its epochs, and logs what it does; phases of one name add up."""
        if message:
            logging.info("%s", message)
        started = time.monotonic()
        try:
            yield
        finally:
            self.phase_seconds[name] += time.monotonic() - started

    def on_stage(self, stage: str, epochs: int, steps: int) -> None:
        """Logs that a stage begins, before its first step, which takes longer than the others."""
        self._first_call = None
        logging.info(
            "Training the %s: %d epochs of %d steps. The first step takes longer: it builds the graph.",
            STAGE_NAMES.get(stage, stage),
            epochs,
            steps,
        )

    def on_steps(self, stage: str, epoch: int, epochs_left: int, steps: int, totals: EpochTotals) -> None:
        """Shows the totals of the epoch so far; `epochs_left` counts the epochs of the stage after this one."""
        if not self._has_started:
            self._has_started = True
            logging.info("First steps done, %.1f s after the start.", time.time() - self._started_at)
        self._steps_done_at = time.monotonic()
        self._first_call = self._first_call or (epoch, totals.steps, totals.seconds)
        examples, seconds = max(totals.examples, 1), max(totals.seconds, 1e-9)
        name = STAGE_NAMES.get(stage, stage)
        status = (
            # The time left comes first: a narrow terminal cuts off the end.
            f"{self._time_left(stage, epoch, epochs_left, steps, totals)}; loss {totals.loss / examples:.4f} "
            f"accuracy {totals.correct / examples:.4f} {totals.examples / seconds:.1f} img/s"
        )
        if self._shows_bars:
            if self._bar is None:
                self._bar = tqdm(
                    desc=f"{epoch} ({name})",
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
            logging.info("epoch %d (%s): step %d of %d, %s", epoch, name, totals.steps, steps, status)

    def _time_left(self, stage: str, epoch: int, epochs_left: int, steps: int, totals: EpochTotals) -> str:
        """Time left and cost, extrapolated from this epoch, the last validation and the start, without later stages."""
        seconds_per_step = self._seconds_per_step(epoch, totals)
        in_epoch = (steps - totals.steps) * seconds_per_step + self._seconds_between_epochs
        in_stage = in_epoch + epochs_left * (steps * seconds_per_step + self._seconds_between_epochs)
        in_job = in_stage + self._closing_seconds()
        over = "" if stage == self._last_stage else "over "
        left = f"epoch {duration(in_epoch)}, job {over}{duration(in_job)} left"
        if not self._cost.price_per_hour:
            return left
        return f"{left}; cost {self._cost.total():.2f}, {over}{self._cost.total(in_job):.2f} in the end"

    def _seconds_per_step(self, epoch: int, totals: EpochTotals) -> float:
        """Without the first call of the stage, which builds the graph, once there is another one in the same epoch."""
        if self._first_call:
            first_epoch, steps, seconds = self._first_call
            if epoch == first_epoch and totals.steps > steps and totals.seconds > seconds:
                return (totals.seconds - seconds) / (totals.steps - steps)
        return max(totals.seconds, 1e-9) / totals.steps

    def _closing_seconds(self) -> float:
        """Estimate of what follows the last epoch: review of the labels, export with its parity check, report."""
        return CLOSING_OVER_START * self.phase_seconds["start"]

    def on_validation(self, done: int, total: int) -> None:
        """Shows the progress of a validation that takes more than a moment, on a terminal."""
        if done == 0:
            self.close()
            self._bar = self.bar("validating", total, delay=0.5)
        elif self._bar:
            self._bar.update(done - self._bar.n)

    def bar(self, description: str, num_examples: int, *, delay: float = 0.0) -> "ImageBar":
        """A bar for one pass over images, with an `update(num_examples)`; use it as a context manager.

        It appears after `delay` seconds. Without a terminal it logs a line every SECONDS_BETWEEN_LINES.
        """
        return ImageBar(
            desc=description,
            total=num_examples,
            unit="img",
            leave=False,
            delay=delay,
            disable=not self._shows_bars,
            **_terminal_size(),
        )

    def on_epoch(
        self,
        row: dict[str, Any],
        times: dict[str, Any],
        *,
        is_best: bool,
        num_validated: int,
        slow_input_advice: str = "",
    ) -> None:
        """Logs an epoch from its rows of history.csv and time.csv as a row of at most 100 characters, in place of the bar.

        `num_validated` is the number of validation images that could be read. If the epoch waited for images,
        `slow_input_advice` is logged too, once per job.
        """
        self.close()
        self._logged_at = time.monotonic()
        self._seconds_between_epochs = self._logged_at - self._steps_done_at
        if not self._has_header:
            self._has_header = True
            logging.info(_HEADER)
        correct = round(row["val_accuracy"] * num_validated)
        counts = f"({correct} of {num_validated})".rjust(2 * len(str(num_validated)) + 6)
        logging.info(
            f"{row['epoch']:5d}  {STAGE_NAMES.get(row['stage'], row['stage']):13}  {row['loss']:6.4f}  "
            f"{formatting.percent(row['accuracy'], 1):>8}  {row['val_loss']:8.4f}  "
            f"{formatting.share(correct, num_validated):>7} {counts}  {duration(row['seconds']):>10}"
            f"{'  ' + cli.colored('best', 'green') if is_best else ''}"
        )
        input_wait = times["input_wait_seconds"] / max(row["seconds"], 1e-9)
        self._advise_on_slow_input(slow_input_advice, input_wait=input_wait, seconds=row["seconds"])

    def _advise_on_slow_input(self, advice: str, *, input_wait: float, seconds: float) -> None:
        """Logs once per job that the devices wait for images, and what to try; `input_wait` is a fraction of `seconds`."""
        if self._is_advised or not advice or seconds < SLOW_INPUT_MIN_SECONDS or input_wait < SLOW_INPUT_SHARE:
            return
        self._is_advised = True
        logging.info("Input wait %.0f %%: the device waits for images. %s", 100 * input_wait, advice)

    def close(self) -> None:
        """Removes the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class ImageBar(tqdm):
    """A bar on a terminal; where it is disabled, a log line every SECONDS_BETWEEN_LINES with the time left."""

    def __init__(self, *, desc: str, total: int, **arguments: Any):
        super().__init__(desc=desc, total=total, **arguments)
        self._what, self._num_images, self._num_done = desc, total, 0.0
        self._started_at = self._logged_at = time.monotonic()

    def update(self, n: float = 1) -> bool | None:
        """Adds `n` images."""
        self._num_done += n
        now = time.monotonic()
        if self.disable and now - self._logged_at >= SECONDS_BETWEEN_LINES and self._num_done < self._num_images:
            self._logged_at = now
            left = (now - self._started_at) * (self._num_images / self._num_done - 1)
            logging.info("%s: %d of %d images, %s left", self._what, self._num_done, self._num_images, duration(left))
        return super().update(n)


def _terminal_size() -> dict[str, int]:
    """The size of the terminal; 80 by 24 if a pseudo-terminal reports none, in which case tqdm would draw nothing."""
    size = shutil.get_terminal_size()
    return {"ncols": size.columns, "nrows": size.lines}
