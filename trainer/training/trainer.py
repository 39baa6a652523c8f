"""The stages epoch by epoch: validation, the best weights, early stopping, checkpoints, resume.

Shapes: V validation images, C classes.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from absl import logging

from trainer.artifacts import best_weights
from trainer.artifacts.best_weights import BestEpoch
from trainer.artifacts.job_dir import JobDir
from trainer.data.sampler import EpochPlan
from trainer.errors import UserError
from trainer.models.networks import Network
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint
from trainer.training.inference import ModelOutputs, Validation, evaluate_logits
from trainer.training.interruption import StopReason, TrainingInterrupted
from trainer.training.loop import EpochTotals, NonFiniteLossError, ProfileRange, TrainingLoop, train_epoch

HEAD, WHOLE_NETWORK = "head", "all"  # names of the stages, in history.csv and in checkpoints


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One stage of the training: `head` on features, or `all` (the whole network) on images.

    `make_loop(learning_rate_factor)` returns a new loop. `training_batches(epoch, first_step)` and
    `validation_batches()` return the plan of a pass and its batches. `fit_head()`, if it is given, sets the head to its
    optimum in place of training steps and returns the totals of the training examples; such a stage has one epoch.
    """

    name: str
    epochs: int
    make_loop: Callable[[float], TrainingLoop]
    training_batches: Callable[[int, int], tuple[EpochPlan, Iterable]]
    validation_batches: Callable[[], tuple[EpochPlan, Iterable]]
    training_paths: np.ndarray  # str objects [N], to name the images of a step
    fit_head: Callable[[], EpochTotals] | None = None
    feature_seconds_per_image: float | None = None  # if features were computed, and not read, before this stage
    slow_input_advice: str = ""  # what to try if the device waits for the input
    profile: ProfileRange | None = None  # of the first epoch


@dataclasses.dataclass(frozen=True, eq=False)
class EpochResult:
    """A complete epoch: its rows of history.csv and time.csv, and whether its validation accuracy is the best so far."""

    row: dict[str, Any]
    times: dict[str, Any]
    is_best: bool
    num_validated: int  # images that could be read


@dataclasses.dataclass
class TrainingState:
    """The position of a run and its history: the part of a checkpoint that is not an array."""

    stage: str = ""
    stage_epochs: int = 0  # completed epochs of the stage
    totals: EpochTotals = dataclasses.field(default_factory=EpochTotals)  # of the current epoch
    saving_seconds: float = 0.0  # in the current epoch
    history: list[dict] = dataclasses.field(default_factory=list)
    times: list[dict] = dataclasses.field(default_factory=list)
    ranks: list[list[float]] = dataclasses.field(default_factory=list)  # BestEpoch.rank of each epoch of the stage
    learning_rate_factor: float = 1.0
    flips: bool = True  # whether augmentation flips images, decided before the first epoch of the whole network
    nan_retries_used: int = 0
    seconds: float = 0.0  # of the whole job so far, over all its starts

    def as_json(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {**dataclasses.asdict(self), "totals": list(dataclasses.astuple(self.totals))}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "TrainingState":
        """The inverse of as_json."""
        return TrainingState(**{**value, "totals": EpochTotals(*value["totals"])})


@dataclasses.dataclass(frozen=True)
class TrainerOptions:
    """How a Trainer validates, writes checkpoints and recovers; each field is the flag of the same name."""

    monitor: str
    label_smoothing: float
    early_stopping_patience: int
    checkpoint_secs: float
    nan_retries: int
    steps_per_loop: int


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """What a Trainer calls while it runs."""

    on_steps: Callable[[str, int, int, int, EpochTotals], None]  # stage, epoch, epochs left, steps, totals
    stop_requested: Callable[[], StopReason]
    job_seconds: Callable[[], float]  # of the whole job so far
    on_stage: Callable[[str, int, int], None] = lambda stage, epochs, steps: None
    on_validation: Callable[[int, int], None] = lambda done, total: None  # images
    barrier: Callable[[], None] = lambda: None  # returns when all workers have called it


class Trainer:
    """Trains the stages of a run. A checkpoint holds its complete state between two steps; only the chief writes."""

    def __init__(
        self,
        network: Network,
        *,
        paths: JobDir,
        is_chief: bool,
        validation_labels: np.ndarray,
        options: TrainerOptions,
        callbacks: Callbacks,
    ):
        self.state, self.best = TrainingState(), best_weights.NO_EPOCH
        self._network, self._paths, self._is_chief = network, paths, is_chief
        self._labels, self._options, self._callbacks = validation_labels, options, callbacks
        self._writer = checkpoint.CheckpointWriter(paths)
        self._saved_at = time.monotonic()
        self._announced = ""  # the stage that on_stage has reported
        # Of the checkpoint to resume from, until _make_loop restores them.
        self._arrays: dict[str, np.ndarray] = {}
        # Of the head stage: small enough to be part of each checkpoint.
        self._best_head: dict[str, np.ndarray] = {}

    def resume(self) -> bool:
        """Restores the newest checkpoint; returns whether there was one."""
        latest = checkpoint.load_latest(self._paths, rename_damaged=self._is_chief)
        if latest is None:
            return False
        self.state, self._arrays = TrainingState.from_json(latest.state["progress"]), latest.arrays
        self._best_head = {name: value for name, value in latest.arrays.items() if name.startswith("best/")}
        self.best = best_weights.read(self._paths.best_weights)
        if "validation/probabilities" in latest.arrays:  # of the head stage, or of an earlier version
            in_checkpoint, monitor = _best_in(latest), self._options.monitor
            # Weights written after the checkpoint: on some devices, repeated steps give other numbers. Keep the better ones.
            is_newer = self.best.rank(monitor) > in_checkpoint.rank(monitor)
            if not is_newer and self.best.epoch != in_checkpoint.epoch:
                self.best = in_checkpoint
        return True

    def position(self) -> tuple:
        """The position of the run, by which workers are compared."""
        return self.state.stage, self.state.stage_epochs, self.state.totals.steps, self.best.epoch

    def epochs(self, stage: Stage) -> Iterator[EpochResult]:
        """Trains the stage from its current position to its end and yields each epoch.

        Raises TrainingInterrupted, and UserError if the loss is not finite and --nan_retries are used up.
        """
        if self.state.stage != stage.name:
            self.state.stage, self.state.stage_epochs, self.state.totals = stage.name, 0, EpochTotals()
            self.state.ranks = []
            self.state.learning_rate_factor = 1.0
        loop = self._make_loop(stage)
        while self.state.stage_epochs < stage.epochs and not self._stops_early(stage):
            try:
                result = self._train_epoch(stage, loop)
            except NonFiniteLossError as error:
                loop = self._restore_after_nan(stage, error)
                continue
            yield result
        self.finish_stage(stage.name)

    def _make_loop(self, stage: Stage) -> TrainingLoop:
        loop = stage.make_loop(self.state.learning_rate_factor)
        if self._arrays:
            checkpoint.restore(loop.variables, self._arrays)
            self._arrays = {}
        return loop

    def _train_epoch(self, stage: Stage, loop: TrainingLoop) -> EpochResult:
        state, number = self.state, len(self.state.history) + 1
        if stage.fit_head:
            totals = stage.fit_head()
            self._callbacks.on_steps(stage.name, number, 0, totals.steps, totals)
        else:
            totals = self._train_steps(stage, loop, number)
        try:
            started = time.monotonic()
            validation = self._validate(stage, loop)
        except TrainingInterrupted:
            self.save(loop)
            raise
        validated = time.monotonic()
        row = _history_row(stage, loop, number, totals, validation)
        reached = _best_epoch(number, validation)
        rank = reached.rank(self._options.monitor)
        is_best = rank > self.best.rank(self._options.monitor)
        if is_best:
            self._keep_best(stage, reached)
        state.saving_seconds += time.monotonic() - validated
        times = _time_row(row, totals, validated - started, state.saving_seconds)
        state.history.append(row)
        state.times.append(times)
        state.ranks.append(list(rank))
        state.stage_epochs, state.totals, state.saving_seconds = state.stage_epochs + 1, EpochTotals(), 0.0
        self.save(loop)
        times["saving_seconds"] += state.saving_seconds  # of this checkpoint, which cannot contain its own duration
        state.saving_seconds = 0.0
        return EpochResult(row, times, is_best, num_validated=int(validation.is_readable.sum()))

    def _train_steps(self, stage: Stage, loop: TrainingLoop, number: int) -> EpochTotals:
        """The remaining steps of the epoch `number`, with checkpoints in between."""
        state = self.state
        plan, batches = stage.training_batches(state.stage_epochs, state.totals.steps)
        if self._announced != stage.name:
            self._announced = stage.name
            self._callbacks.on_stage(stage.name, stage.epochs, plan.steps)

        def after_steps(totals: EpochTotals, is_stopped: bool) -> None:
            state.totals = totals
            self._callbacks.on_steps(stage.name, number, stage.epochs - state.stage_epochs - 1, plan.steps, totals)
            if is_stopped or time.monotonic() - self._saved_at >= self._options.checkpoint_secs:
                self.save(loop)

        return train_epoch(
            loop,
            batches,
            plan.steps,
            state.totals,
            steps_per_loop=self._options.steps_per_loop,
            stop_requested=self._callbacks.stop_requested,
            after_steps=after_steps,
            profile=None if state.stage_epochs else stage.profile,
        )

    def _validate(self, stage: Stage, loop: TrainingLoop) -> Validation:
        plan, batches = stage.validation_batches()
        done, total, report = 0, int(plan.weight.sum()), self._callbacks.on_validation

        def on_batch(outputs: ModelOutputs) -> None:
            nonlocal done
            done += len(outputs.values)
            report(done, total)

        report(0, total)
        outputs = loop.logits(batches, plan, on_batch=on_batch, stop_requested=self._callbacks.stop_requested)
        return evaluate_logits(outputs, self._labels, self._options.label_smoothing)

    def _keep_best(self, stage: Stage, reached: BestEpoch) -> None:
        """Keeps the current weights as the best ones."""
        self.best = reached
        if stage.name == HEAD:
            self._best_head = checkpoint.snapshot(checkpoint.name_variables("best", self._network.head.variables))
        elif self._is_chief:
            best_weights.write(self._paths.best_weights, self._network.model, self.best)

    def finish_stage(self, stage_name: str) -> None:
        """Restores the best head and writes it to best.weights.h5: the start of the next stage, or of the export."""
        if stage_name != HEAD or not self._best_head:
            return
        checkpoint.restore(checkpoint.name_variables("best", self._network.head.variables), self._best_head)
        if self._is_chief and best_weights.read(self._paths.best_weights).epoch != self.best.epoch:
            best_weights.write(self._paths.best_weights, self._network.model, self.best)

    def _stops_early(self, stage: Stage) -> bool:
        """Whether none of the last `patience` epochs of the stage is better by --monitor; the same on all workers."""
        patience, ranks = self._options.early_stopping_patience, self.state.ranks
        if not patience or len(ranks) < patience:
            return False
        stops = max(ranks[:-patience], default=[]) >= max(ranks[-patience:])
        if stops:
            logging.info(
                "Stage %s stops early: no better %s for %d epochs.", stage.name, self._options.monitor, patience
            )
        return stops

    def _restore_after_nan(self, stage: Stage, error: NonFiniteLossError) -> TrainingLoop:
        """A loop at the last checkpoint with half the learning rate, at most --nan_retries times; else UserError."""
        plan, _ = stage.training_batches(self.state.stage_epochs, 0)
        is_real = plan.weight[error.step] > 0
        paths = ", ".join(repr(path) for path in stage.training_paths[plan.index[error.step][is_real]])
        what = (
            f"Stage {stage.name}, epoch {len(self.state.history) + 1}, step {error.step + 1}: {error}. "
            f"Images of that step: {paths}."
        )
        used, factor = self.state.nan_retries_used, self.state.learning_rate_factor
        if used >= self._options.nan_retries:
            raise UserError(f"{what} The last checkpoint is kept: lower the learning rate, or set --clip_norm=1.")
        self._writer.wait()
        self._callbacks.barrier()  # the other workers read what the chief has just written
        has_checkpoint = self.resume()
        if not has_checkpoint or self.state.stage != stage.name:
            raise UserError(f"{what} This stage has no checkpoint yet: lower the learning rate, or set --clip_norm=1.")
        self.state.nan_retries_used, self.state.learning_rate_factor = used + 1, factor / 2
        logging.warning("%s Restoring the last checkpoint with half the learning rate.", what)
        return self._make_loop(stage)

    def save(self, loop: TrainingLoop) -> None:
        """Passes a checkpoint of the current state to the background writer (chief only)."""
        started = self._saved_at = time.monotonic()
        if not self._is_chief:
            return
        self.state.seconds = self._callbacks.job_seconds()
        arrays = checkpoint.snapshot(loop.variables)
        if self.state.stage == HEAD:  # later, best.weights.h5 has the best epoch
            arrays |= self._best_head
            arrays["validation/probabilities"] = self.best.probabilities
            arrays["validation/is_readable"] = self.best.is_readable
        best = [self.best.epoch, self.best.val_accuracy, self.best.val_loss, self.best.balanced_accuracy]
        self._writer.save(arrays, {"progress": self.state.as_json(), "best": best})
        self.state.saving_seconds += time.monotonic() - started

    def wait(self) -> None:
        """Waits until the last checkpoint is written; raises its error."""
        self._writer.wait()


def _best_in(saved: Checkpoint) -> BestEpoch:
    """The best epoch that a checkpoint contains."""
    epoch, val_accuracy, val_loss, *rest = saved.state["best"]
    return BestEpoch(
        epoch=epoch,
        val_accuracy=val_accuracy,
        val_loss=val_loss,
        balanced_accuracy=rest[0] if rest else -1.0,  # checkpoints of earlier versions have none
        probabilities=saved.arrays["validation/probabilities"],
        is_readable=saved.arrays["validation/is_readable"],
    )


def _best_epoch(number: int, validation: Validation) -> BestEpoch:
    """The validation of the epoch `number`, as best.weights.h5 keeps it."""
    return BestEpoch(
        epoch=number,
        val_accuracy=validation.accuracy,
        val_loss=validation.loss,
        balanced_accuracy=validation.balanced_accuracy,
        probabilities=validation.probabilities,
        is_readable=validation.is_readable,
    )


def _history_row(
    stage: Stage, loop: TrainingLoop, number: int, totals: EpochTotals, validation: Validation
) -> dict[str, Any]:
    """The row of history.csv of an epoch."""
    num_examples = max(totals.examples, 1)
    return {
        "epoch": number,
        "stage": stage.name,
        "loss": totals.loss / num_examples,
        "accuracy": totals.correct / num_examples,
        "val_loss": validation.loss,
        "val_accuracy": validation.accuracy,
        "learning_rate": 0.0 if stage.fit_head else float(loop.optimizer.learning_rate.numpy()),
        "seconds": round(totals.seconds, 3),
        "images_per_second": round(totals.examples / max(totals.seconds, 1e-9), 2),
    }


def _time_row(
    row: dict[str, Any], totals: EpochTotals, validation_seconds: float, saving_seconds: float
) -> dict[str, Any]:
    """The row of time.csv of an epoch. The ceiling is the rate of the steps without waiting for input."""
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
