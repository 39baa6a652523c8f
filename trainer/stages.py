"""The two stages, epoch by epoch: validation, the best weights, early stopping, checkpoints, resume.

Shapes: V validation pictures, C classes.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import keras
import numpy as np
from absl import logging

from trainer import checkpoint, job_dir, train
from trainer.data import Epoch
from trainer.errors import UserError
from trainer.job_dir import Best, JobDir
from trainer.train import Loop, NotFinite, Stopped, Totals


class Stage(NamedTuple):
    """One stage of the training: `head` over features, or `all` over pictures.

    `make_loop(learning_rate_factor)` gives a fresh loop. The two batches functions give the epoch's layout and its
    batches: of training for (epoch, first step), of validation for ().
    """

    name: str
    epochs: int
    make_loop: Callable[[float], Loop]
    training_batches: Callable[[int, int], tuple[Epoch, Iterable]]
    validation_batches: Callable[[], tuple[Epoch, Iterable]]
    training_paths: np.ndarray  # of str, for naming the pictures of a step
    if_input_is_slow: str = ""  # what to try then
    profile: train.Profile | None = None  # of the first epoch


class EpochResult(NamedTuple):
    """A finished epoch: its rows of history.csv and time.csv, and whether its validation accuracy is the best so far."""

    row: dict
    times: dict
    is_best: bool


@dataclasses.dataclass
class Progress:
    """Where a run stands: the part of a checkpoint that is no array."""

    stage: str = ""
    stage_epochs: int = 0  # complete ones of the stage
    totals: Totals = dataclasses.field(default_factory=Totals)  # of the epoch that has begun
    saving_seconds: float = 0.0  # in that epoch
    history: list[dict] = dataclasses.field(default_factory=list)
    times: list[dict] = dataclasses.field(default_factory=list)
    learning_rate_factor: float = 1.0
    nan_retries_used: int = 0
    seconds: float = 0.0  # of the whole job so far, over all its starts

    def as_json(self) -> dict:
        """As values that JSON can hold."""
        return {**dataclasses.asdict(self), "totals": list(self.totals)}

    @staticmethod
    def from_json(value: dict) -> "Progress":
        """The same again from as_json's values."""
        return Progress(**{**value, "totals": Totals(*value["totals"])})


class Watcher(NamedTuple):
    """What a run tells while it goes on."""

    on_round: Callable[[str, int, int, int, Totals], None]  # stage, epoch, epochs left, steps, totals
    wish_to_stop: Callable[[], float]  # 0, or the reason: train.BY_SIGNAL, train.BY_COST
    seconds: Callable[[], float]  # of the whole job so far


class Run:
    """The state of a run between its steps, saved and restored whole; only the chief writes."""

    def __init__(
        self,
        model: keras.Model,
        head: keras.Model,
        *,
        paths: JobDir,
        is_chief: bool,
        validation_labels: np.ndarray,
        label_smoothing: float,
        early_stopping_patience: int,
        checkpoint_secs: float,
        nan_retries: int,
        steps_per_loop: int,
        watcher: Watcher,
    ):
        self.progress, self.best = Progress(), job_dir.NONE_YET
        self._model, self._head = model, head
        self._paths, self._is_chief = paths, is_chief
        self._labels, self._label_smoothing = validation_labels, label_smoothing
        self._patience, self._checkpoint_secs, self._nan_retries = early_stopping_patience, checkpoint_secs, nan_retries
        self._steps_per_loop, self._watcher = steps_per_loop, watcher
        self._saver = checkpoint.Saver(paths.checkpoints)
        self._saved_at = time.monotonic()
        self._arrays: dict[str, np.ndarray] = {}  # of the save to go on from, until the loop that takes them is there
        self._best_head: dict[str, np.ndarray] = {}  # of the head stage: small, so it travels in the checkpoints

    def resume(self) -> bool:
        """Takes up the newest save, if there is one; returns whether there was."""
        save = checkpoint.newest(self._paths.checkpoints, set_aside=self._is_chief)
        if save is None:
            return False
        self.progress, self._arrays = Progress.from_json(save.state["progress"]), save.arrays
        self._best_head = {name: value for name, value in save.arrays.items() if name.startswith("best/")}
        epoch, val_accuracy, val_loss = save.state["best"]
        probabilities, is_readable = (save.arrays[f"validation/{name}"] for name in ("probabilities", "is_readable"))
        self.best = Best(epoch, val_accuracy, val_loss, probabilities, is_readable)
        on_disk = job_dir.read_best(self._paths.best_weights)
        if on_disk.val_accuracy > self.best.val_accuracy or on_disk.epoch == self.best.epoch:
            # Saved after the checkpoint. Steps done again need not be exactly as good on every device: keep the better.
            self.best = on_disk
        return True

    def position(self) -> tuple:
        """Where the run stands, for comparing workers."""
        return self.progress.stage, self.progress.stage_epochs, self.progress.totals.steps, self.best.epoch

    def epochs(self, stage: Stage) -> Iterator[EpochResult]:
        """Trains the stage from where it stands to its end, yielding after each epoch. Raises Stopped when stopped."""
        if self.progress.stage != stage.name:
            self.progress.stage, self.progress.stage_epochs, self.progress.totals = stage.name, 0, Totals()
            self.progress.learning_rate_factor = 1.0
        loop = self._make_loop(stage)
        while self.progress.stage_epochs < stage.epochs and not self._is_early_stop(stage):
            try:
                result = self._train_epoch(stage, loop)
            except NotFinite as failure:
                loop = self._go_back(stage, failure)
                continue
            yield result
        self.end(stage.name)

    def _make_loop(self, stage: Stage) -> Loop:
        loop = stage.make_loop(self.progress.learning_rate_factor)
        if self._arrays:
            checkpoint.restore(loop.variables, self._arrays)
            self._arrays = {}
        return loop

    def _train_epoch(self, stage: Stage, loop: Loop) -> EpochResult:
        progress, number = self.progress, len(self.progress.history) + 1
        layout, batches = stage.training_batches(progress.stage_epochs, progress.totals.steps)

        def after_round(totals: Totals, is_stopped: bool) -> None:
            progress.totals = totals
            self._watcher.on_round(stage.name, number, stage.epochs - progress.stage_epochs - 1, layout.steps, totals)
            if is_stopped or time.monotonic() - self._saved_at >= self._checkpoint_secs:
                self.save(loop)

        totals = train.train_epoch(
            loop,
            batches,
            layout.steps,
            progress.totals,
            steps_per_loop=self._steps_per_loop,
            wish_to_stop=self._watcher.wish_to_stop,
            after_loop=after_round,
            profile=None if progress.stage_epochs else stage.profile,
        )
        try:
            started = time.monotonic()
            validation = self._validate(stage, loop)
        except Stopped:
            self.save(loop)
            raise
        validated = time.monotonic()
        row = self._row(stage, loop, number, totals, validation)
        is_best = validation.accuracy > self.best.val_accuracy
        if is_best:
            self._keep(stage, Best(number, validation.accuracy, validation.loss, *validation[2:]))
        progress.saving_seconds += time.monotonic() - validated
        times = _times(row, totals, validated - started, progress.saving_seconds)
        progress.history.append(row)
        progress.times.append(times)
        progress.stage_epochs, progress.totals, progress.saving_seconds = progress.stage_epochs + 1, Totals(), 0.0
        self.save(loop)
        times["saving_seconds"] += progress.saving_seconds  # of this save, which could not hold it itself
        progress.saving_seconds = 0.0
        return EpochResult(row, times, is_best)

    def _validate(self, stage: Stage, loop: Loop) -> train.Validation:
        layout, batches = stage.validation_batches()
        outputs = loop.logits(batches, layout, wish_to_stop=self._watcher.wish_to_stop)
        return train.validate(outputs, self._labels, self._label_smoothing)

    def _row(self, stage: Stage, loop: Loop, number: int, totals: Totals, validation: train.Validation) -> dict:
        examples = max(totals.examples, 1)
        return {
            "epoch": number,
            "stage": stage.name,
            "loss": totals.loss / examples,
            "accuracy": totals.correct / examples,
            "val_loss": validation.loss,
            "val_accuracy": validation.accuracy,
            "learning_rate": float(loop.optimizer.learning_rate.numpy()),
            "seconds": round(totals.seconds, 3),
            "images_per_second": round(totals.examples / max(totals.seconds, 1e-9), 2),
        }

    def _keep(self, stage: Stage, best: Best) -> None:
        self.best = best
        if stage.name == "head":
            self._best_head = checkpoint.snapshot(checkpoint.named("best", self._head.variables))
        elif self._is_chief:
            job_dir.write_best(self._paths.best_weights, self._model, best)

    def end(self, stage_name: str) -> None:
        """Leaves the head at its best, and best.weights.h5 with it: what the next stage, or the export, starts from."""
        if stage_name != "head" or not self._best_head:
            return
        checkpoint.restore(checkpoint.named("best", self._head.variables), self._best_head)
        if self._is_chief and job_dir.read_best(self._paths.best_weights).epoch != self.best.epoch:
            job_dir.write_best(self._paths.best_weights, self._model, self.best)

    def _is_early_stop(self, stage: Stage) -> bool:
        """Whether the last `patience` epochs of the stage brought nothing better; the same on all workers."""
        if not self._patience or self.progress.stage_epochs < self._patience:
            return False
        accuracies = [row["val_accuracy"] for row in self.progress.history if row["stage"] == stage.name]
        is_over = max(accuracies[: -self._patience], default=-1.0) >= max(accuracies[-self._patience :])
        if is_over:
            logging.info("Stage %s stops early: no better for %d epochs.", stage.name, self._patience)
        return is_over

    def _go_back(self, stage: Stage, failure: NotFinite) -> Loop:
        """A loop at the last save with half the learning rate, once per --nan_retries; else UserError."""
        layout, _ = stage.training_batches(self.progress.stage_epochs, 0)
        is_real = layout.weight[failure.step] > 0
        pictures = ", ".join(repr(path) for path in stage.training_paths[layout.index[failure.step][is_real]])
        what = (
            f"Stage {stage.name}, epoch {len(self.progress.history) + 1}, step {failure.step + 1}: {failure}. "
            f"The pictures of that step: {pictures}."
        )
        used, factor = self.progress.nan_retries_used, self.progress.learning_rate_factor
        if used >= self._nan_retries:
            raise UserError(f"{what} The last good state is kept: lower the learning rate, or set --clip_norm=1.")
        self._saver.wait()
        has_save = self.resume()
        if not has_save or self.progress.stage != stage.name:  # nothing of this stage was saved: from its beginning
            raise UserError(f"{what} Nothing was saved before it: lower the learning rate, or set --clip_norm=1.")
        self.progress.nan_retries_used, self.progress.learning_rate_factor = used + 1, factor / 2
        logging.warning("%s Going back to the last save with half the learning rate.", what)
        return self._make_loop(stage)

    def save(self, loop: Loop | None) -> None:
        """Hands a save of this moment to the background writer (chief only)."""
        started = self._saved_at = time.monotonic()
        if not self._is_chief:
            return
        self.progress.seconds = self._watcher.seconds()
        arrays = checkpoint.snapshot(loop.variables) if loop else {}
        arrays |= self._best_head if self.progress.stage == "head" else {}
        arrays |= {"validation/probabilities": self.best.probabilities, "validation/is_readable": self.best.is_readable}
        self._saver.save(arrays, {"progress": self.progress.as_json(), "best": list(self.best[:3])})
        self.progress.saving_seconds += time.monotonic() - started

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        self._saver.wait()


def _times(row: dict, totals: Totals, validation_seconds: float, saving_seconds: float) -> dict:
    """An epoch's row of time.csv. The ceiling is the rate at which the steps would run if no batch were waited for."""
    compute_seconds = totals.seconds - totals.input_wait_seconds
    return {
        "epoch": row["epoch"],
        "stage": row["stage"],
        "input_wait_seconds": totals.input_wait_seconds,
        "compute_seconds": compute_seconds,
        "validation_seconds": validation_seconds,
        "saving_seconds": saving_seconds,
        "images_per_second": row["images_per_second"],
        "ceiling_images_per_second": round(totals.examples / max(compute_seconds, 1e-9), 2),
    }
