"""What a person sees while a job runs: one progress bar per epoch, plain lines where the output is no terminal."""

import shutil
import time

import psutil
from absl import logging
from tqdm import tqdm

from trainer.cost import Cost
from trainer.train import Totals
from trainer.wording import duration

SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


class Terminal:
    """A bar that follows rounds of steps, with the time left for the epoch and for the job."""

    def __init__(self, shows_bars: bool, *, last_stage: str, cost: Cost):
        """`last_stage` is the one after which the job ends."""
        self._cost = cost
        self._shows_bars, self._last_stage = shows_bars, last_stage
        self._bar: tqdm | None = None
        self._said_at = time.monotonic()
        self._has_begun = False
        self._steps_done_at = time.monotonic()
        self._seconds_between_epochs = 0.0  # validation and saving, as they took after the last epoch of this start

    def on_round(self, stage: str, epoch: int, epochs_left: int, steps: int, totals: Totals) -> None:
        """Shows the totals of the epoch so far; `epochs_left` counts those of the stage after this one."""
        if not self._has_begun:
            self._has_begun = True
            logging.info("First steps done, %.1f s after the start.", time.time() - psutil.Process().create_time())
        self._steps_done_at = time.monotonic()
        examples, seconds = max(totals.examples, 1), max(totals.seconds, 1e-9)
        figures = (
            # What is left comes first: a narrow terminal cuts off the end.
            f"{self._left(stage, epochs_left, steps, totals)}; loss {totals.loss / examples:.4f} "
            f"accuracy {totals.correct / examples:.4f} {totals.examples / seconds:.1f} img/s"
        )
        if self._shows_bars:
            if self._bar is None:
                self._bar = tqdm(
                    desc=f"{epoch} ({stage})",
                    total=steps,
                    initial=totals.steps,
                    bar_format="{desc}|{bar}|{n_fmt}/{total_fmt}{postfix}",  # the bar takes what room is left
                    **_size(),
                    leave=False,
                )
            self._bar.n = totals.steps
            self._bar.set_postfix_str(figures)
        elif time.monotonic() - self._said_at >= SECONDS_BETWEEN_LINES and totals.steps < steps:
            self._said_at = time.monotonic()
            logging.info("epoch %d (%s): step %d of %d, %s", epoch, stage, totals.steps, steps, figures)

    def _left(self, stage: str, epochs_left: int, steps: int, totals: Totals) -> str:
        """Time left and cost, as this epoch and the last validation went; of a stage to come nothing is known yet."""
        seconds_per_step = max(totals.seconds, 1e-9) / totals.steps
        in_epoch = (steps - totals.steps) * seconds_per_step + self._seconds_between_epochs
        in_stage = in_epoch + epochs_left * (steps * seconds_per_step + self._seconds_between_epochs)
        over = "" if stage == self._last_stage else "over "
        left = f"epoch {duration(in_epoch)}, job {over}{duration(in_stage)} left"
        if not self._cost.price_per_hour:
            return left
        return f"{left}; cost {self._cost.after():.2f}, {over}{self._cost.after(in_stage):.2f} in the end"

    def pass_over(self, what: str, num_examples: int) -> tqdm:
        """A bar for one pass over pictures, with an `update(examples)`; to be used as a context."""
        return tqdm(
            desc=what,
            total=num_examples,
            unit="img",
            leave=False,
            disable=not self._shows_bars,
            **_size(),
        )

    def on_epoch(self, row: dict, times: dict, *, is_best: bool) -> None:
        """Ends the bar with the epoch's line, from its rows of history.csv and time.csv."""
        self.close()
        self._said_at = time.monotonic()
        self._seconds_between_epochs = self._said_at - self._steps_done_at
        logging.info(
            "epoch %d (%s): loss %.4f, accuracy %.4f, val_loss %.4f, val_accuracy %.4f%s, %s, %.1f img/s; "
            "input wait %.0f %%, validation %s, saving %s",
            *(row[name] for name in ("epoch", "stage", "loss", "accuracy", "val_loss", "val_accuracy")),
            " (best so far)" if is_best else "",
            duration(row["seconds"]),
            row["images_per_second"],
            100 * times["input_wait_seconds"] / max(row["seconds"], 1e-9),
            duration(times["validation_seconds"]),
            duration(times["saving_seconds"]),
        )

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar:
            self._bar.close()
            self._bar = None


def _size() -> dict[str, int]:
    """The terminal's size; 80 by 24 where a pseudo-terminal tells none, which tqdm would take as no room at all."""
    size = shutil.get_terminal_size()
    return {"ncols": size.columns, "nrows": size.lines}
