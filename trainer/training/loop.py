"""Training steps whose results do not depend on the number of replicas.

Shapes: N examples, B in a global batch, R replicas, b of B in a replica, F features, C classes.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.cli import memory_error
from trainer.data.sampler import EpochPlan
from trainer.errors import UserError
from trainer.models import folded
from trainer.runtime import agreement
from trainer.runtime.devices import Devices
from trainer.training import interruption
from trainer.training.checkpoint import name_variables
from trainer.training.inference import ModelOutputs, make_inference, run_inference
from trainer.training.interruption import StopReason, TrainingInterrupted

_NUM_STOP_REASONS = len(StopReason) - 1  # without NONE
_STOP_COLUMNS = slice(3, 3 + _NUM_STOP_REASONS)  # of the row of a step
_ROW_SIZE = 3 + _NUM_STOP_REASONS + 1

# Gradients are summed over the replicas in parts of this size, the last layers' first, while those of earlier layers are
# still being computed; in one part, they would wait for the first layer. The default of PyTorch's DistributedDataParallel.
BYTES_PER_PACK = 25 * 2**20


class TrainingLoop:
    """Trains and evaluates `head` behind `backbone` (None: the examples are features already) on all replicas.

    Batches are those of input_pipeline.batches. Create it after the networks and outside of any strategy scope.
    """

    def __init__(
        self,
        backbone: keras.Model | None,
        head: keras.Model,
        optimizer: keras.Optimizer,
        *,
        devices: Devices,
        batch_size: int,
        seed: int,
        label_smoothing: float = 0.0,
        dropout: float = 0.0,
        jit_compile: bool = False,
        accumulate_steps: int = 1,
    ):
        """Computes the batch of each replica in `accumulate_steps` parts. Raises UserError if they would not be equal."""
        self.backbone, self.head, self.optimizer = backbone, head, optimizer
        self._devices, self._batch_size, self._seed, self._dropout = devices, batch_size, seed, dropout
        self._accumulate_steps = accumulate_steps
        self._check_parts_are_equal()
        self._loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=label_smoothing, reduction=None
        )
        networks = [network for network in (backbone, head) if network is not None]
        self._trainable = [variable for network in networks for variable in network.trainable_variables]
        with devices.strategy.scope():
            optimizer.build(self._trainable)
            self._folded = folded.fold(backbone) if backbone else None
        self._forward = self._training_forward()
        # A constant learning rate is a variable too. It comes from the flags and TrainingState, not from these arrays.
        state = [variable for variable in optimizer.variables if variable.name != "learning_rate"]
        self.variables = {
            **name_variables("network", [variable for network in networks for variable in network.variables]),
            **name_variables("optimizer", state),
        }
        self._part_gradients = (
            tf.function(self._gradients, autograph=False, jit_compile=True) if jit_compile else self._gradients
        )
        self._train_steps = tf.function(self._steps, reduce_retracing=True)
        self._infer: Callable | None = None

    def _training_forward(self) -> Callable[[tf.Tensor], tf.Tensor]:
        """The function of examples -> features in training, folded where batch statistics are frozen."""
        backbone = self.backbone
        if backbone is None:
            return tf.identity
        return folded.training_forward(self._folded, backbone) or (lambda images: backbone(images, training=True))

    def trace(self, iterator: Iterator) -> None:
        """Builds the graph of train_steps for such batches; without it, the first call does."""
        self._train_steps.get_concrete_function(iterator, tf.constant(1), tf.constant(0), tf.constant(0))

    def train_steps(
        self, iterator: Iterator, count: int, stop: StopReason = StopReason.NONE, proposal: int = 0
    ) -> "StepResults":
        """Runs up to `count` steps; all workers end after the same step if any of them passes a reason to stop.

        All workers must pass the same count. `proposal` is a later count that this worker proposes; the results have that
        of the chief.
        """
        with self._devices.waiting("training steps"):
            rows, waited = self._train_steps(
                iterator, tf.constant(count), tf.constant(int(stop)), tf.constant(proposal)
            )
            return StepResults(rows.numpy().astype(np.float64), float(waited.numpy()))

    def _steps(
        self, iterator: Iterator, count: tf.Tensor, stop: tf.Tensor, proposal: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        rows = tf.TensorArray(tf.float32, 0, dynamic_size=True, element_shape=[_ROW_SIZE])
        is_stopped = tf.constant(False)
        done, waited = tf.constant(0), tf.constant(0.0, tf.float64)
        while done < count and not is_stopped:
            batch, seconds = self._next_timed(iterator)
            result = self._devices.strategy.run(self._step, args=(batch, stop, proposal))
            row = self._devices.strategy.experimental_local_results(result)[0]  # summed: the same on each replica
            rows = rows.write(done, row)
            is_stopped = tf.reduce_any(row[_STOP_COLUMNS] > 0)
            done, waited = done + 1, waited + seconds
        return rows.stack(), waited

    # AutoGraph converts the loop of _steps alone: to convert what it calls takes a second, and changes nothing.
    @tf.autograph.experimental.do_not_convert
    def _next_timed(self, iterator: Iterator) -> tuple[dict, tf.Tensor]:
        """The next batch, and the seconds (float64) spent waiting for the input alone.

        Only control dependencies order the operations of a graph. The clock starts when the previous step is done: the
        condition of the loop needs its row, and the weights of the first layer, whose gradient comes last, are updated.
        """
        with tf.control_dependencies([tf.convert_to_tensor(self._trainable[0])]):
            started = tf.timestamp()
        with tf.control_dependencies([started]):
            batch = next(iterator)
        local = (self._devices.strategy.experimental_local_results(value) for value in batch.values())
        with tf.control_dependencies([part for parts in local for part in parts]):
            ended = tf.timestamp()
        if self._devices.local_replicas == 1:
            # TensorFlow has one thread on one core, which would compute the step before it reads the clock.
            with tf.control_dependencies([ended]):
                batch = tf.nest.map_structure(tf.identity, batch, expand_composites=True)
        return batch, ended - started

    @tf.autograph.experimental.do_not_convert
    def _step(self, batch: dict[str, tf.Tensor], stop: tf.Tensor, proposal: tf.Tensor) -> tf.Tensor:
        scale = self.optimizer.scale_loss(tf.constant(1.0))
        loss, correct, grads = self._batch_gradients(batch, scale)
        row = tf.stack([loss, correct, tf.reduce_sum(batch["weight"])])
        context = tf.distribute.get_replica_context()
        is_first = tf.equal(context.replica_id_in_sync_group, 0)  # of the chief
        row = tf.concat(
            [
                row,
                tf.one_hot(stop - 1, _NUM_STOP_REASONS),  # NONE becomes zeros
                [tf.cast(tf.where(is_first, proposal, 0), tf.float32)],
            ],
            axis=0,
        )
        if self._devices.replicas > 1:
            options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=BYTES_PER_PACK)
            *grads, row = context.all_reduce(tf.distribute.ReduceOp.SUM, [*grads, row], options)
        self.optimizer.apply(grads, self._trainable)
        return row

    def _batch_gradients(self, batch: dict[str, tf.Tensor], scale: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list]:
        """As _gradients, computed in equal parts of the batch, one after another. Each result is the sum of the parts."""
        factors, num_parts = self._dropout_factors(batch), self._accumulate_steps
        if num_parts == 1:
            return self._part_gradients(batch, factors, scale)
        size = tf.shape(batch["label"])[0]
        rows = {**batch, "factors": tf.broadcast_to(factors, [size, self.head.input_shape[-1]])}
        parts = {name: tf.reshape(value, [num_parts, -1, *value.shape[1:]]) for name, value in rows.items()}

        def add_part(i: tf.Tensor, loss: tf.Tensor, correct: tf.Tensor, grads: list) -> tuple:
            part = {name: value[i] for name, value in parts.items()}
            more_loss, more_correct, more_grads = self._part_gradients(part, part.pop("factors"), scale)
            return (
                i + 1,
                loss + more_loss,
                correct + more_correct,
                [a + b for a, b in zip(grads, more_grads, strict=True)],
            )

        zeros = [tf.zeros(variable.shape, variable.dtype) for variable in self._trainable]
        start = tf.constant(0), tf.constant(0.0), tf.constant(0.0), zeros
        _, loss, correct, grads = tf.while_loop(lambda i, *sums: i < num_parts, add_part, start, parallel_iterations=1)
        return loss, correct, grads

    def choose_accumulate_steps(self, example_shape: tuple[int, ...], dtype: str) -> int:
        """Doubles the number of parts until the gradients of a batch fit in memory, on all workers; returns it.

        `example_shape` and `dtype` are those of an example that the network gets. Raises UserError if one part per example
        does not fit either. Call it before `trace`.
        """
        while agreement.largest(not self._fits_in_memory(example_shape, dtype), self._devices):
            self._accumulate_steps *= 2
            logging.info("A batch does not fit in memory: --accumulate_steps=%d.", self._accumulate_steps)
            self._check_parts_are_equal()
        return self._accumulate_steps

    def _fits_in_memory(self, example_shape: tuple[int, ...], dtype: str) -> bool:
        """Whether the gradients of a batch of zeros can be computed here; nothing is changed."""
        size = self._padded_batch_size() // self._devices.replicas

        batch = {name: tf.zeros([size]) for name in ("weight", "loss_weight")}
        batch |= {"label": tf.zeros([size], tf.int32), "row": tf.zeros([size], tf.int32)}
        batch |= {"x": tf.zeros([size, *example_shape], dtype), "step": tf.zeros([size], tf.int64)}

        @tf.function(
            autograph=False
        )  # with the batch as an argument: TensorFlow computes in advance what depends on constants alone
        def attempt(batch: dict[str, tf.Tensor]) -> tf.Tensor:
            sums = self._devices.strategy.run(
                lambda: tf.add_n([tf.reduce_sum(grad) for grad in self._batch_gradients(batch, tf.constant(1.0))[2]])
            )
            return self._devices.strategy.experimental_local_results(sums)

        try:
            tf.nest.map_structure(lambda value: value.numpy(), attempt(batch))
        except tf.errors.OpError as error:
            if not memory_error(error):
                raise
            return False
        return True

    def _check_parts_are_equal(self) -> None:
        size, parts = self._padded_batch_size() // self._devices.replicas, self._accumulate_steps
        if size % parts:
            raise UserError(
                f"--accumulate_steps={parts}, but each device computes {size} images of the batch, which cannot be divided "
                f"into {parts} equal parts: pass another number, or another --batch_size."
            )

    def _gradients(
        self, batch: dict[str, tf.Tensor], dropout_factors: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list]:
        """This replica's part of the loss, its number of correct predictions, the gradients of that part times `scale`."""
        with tf.GradientTape() as tape:
            features = self._forward(batch["x"])
            logits = self.head(features * tf.cast(dropout_factors, features.dtype), training=True)
            targets = tf.one_hot(batch["label"], logits.shape[-1])
            # The weights sum to 1 over the global batch, so the sum of the replicas' parts is the mean.
            loss = tf.reduce_sum(self._loss(targets, logits) * batch["loss_weight"])
            scaled = loss * scale
        is_correct = tf.argmax(logits, -1, tf.int32) == batch["label"]
        correct = tf.reduce_sum(tf.cast(is_correct, tf.float32) * batch["weight"])
        return loss, correct, tape.gradient(scaled, self._trainable)

    def _dropout_factors(self, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        """Factors of the features, float32 [b, F], a function of (seed, step, row) alone; 1 without dropout.

        A Keras Dropout layer has a random state per replica, which is not part of a checkpoint. Here each replica draws
        the noise of the whole global batch and takes its own rows. XLA does not compile this function, because it draws
        other numbers from the same seed.
        """
        if not self._dropout:
            return tf.constant(1.0)
        seed = tf.stack([tf.constant(self._seed, tf.int64), batch["step"][0]])
        noise = tf.random.stateless_uniform([self._padded_batch_size(), self.head.input_shape[-1]], seed)
        is_kept = tf.gather(noise, batch["row"]) >= self._dropout
        return tf.cast(is_kept, tf.float32) / (1 - self._dropout)

    def _padded_batch_size(self) -> int:
        return -(-self._batch_size // self._devices.replicas) * self._devices.replicas

    def logits(
        self,
        batches: Iterable,
        plan: EpochPlan,
        *,
        on_batch: Callable[[ModelOutputs], None] = lambda outputs: None,
        stop_requested: Callable[[], StopReason] = interruption.never,
    ) -> ModelOutputs:
        """Logits float32 [N, C] of one pass, on all replicas. Raises TrainingInterrupted as run_inference does."""
        if self.backbone:
            folded.refresh(self._folded, self.backbone)
        if self._infer is None:  # traced once, not once per epoch
            head, backbone = self.head, self._folded
            network = (lambda x: head(backbone(x, training=False))) if backbone else head
            self._infer = make_inference(network, self._devices)
        return run_inference(self._infer, batches, plan, on_batch=on_batch, stop_requested=stop_requested)


@dataclasses.dataclass(frozen=True, eq=False)
class StepResults:
    """Results of consecutive steps.

    `rows` is float64 [steps, 6]: loss, number of correct predictions, sum of the weights, then for each StopReason but
    NONE the number of replicas that asked to stop, then the chief's proposal.
    """

    rows: np.ndarray
    input_wait_seconds: float

    @property
    def stop_reason(self) -> StopReason:
        """The largest reason to stop that a replica gave at the last step."""
        asked = np.flatnonzero(self.rows[-1, _STOP_COLUMNS])
        return StopReason(int(asked[-1]) + 1) if len(asked) else StopReason.NONE

    @property
    def proposal(self) -> int:
        """What the chief passed as `proposal`; the same on all workers."""
        return int(self.rows[-1, -1])


class NonFiniteLossError(ArithmeticError):
    """The loss of a step is not finite; `step` counts from 0 within the epoch."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss is {loss}")
        self.step = step


@dataclasses.dataclass(frozen=True)
class EpochTotals:
    """Sums over the steps of an epoch so far; part of a checkpoint, in this order."""

    steps: int = 0
    loss: float = 0.0  # sum over the examples
    correct: float = 0.0
    examples: float = 0.0
    seconds: float = 0.0  # of the steps, with waiting for input and without building the graph
    input_wait_seconds: float = 0.0

    def add(self, steps: StepResults, seconds: float) -> "EpochTotals":
        """The sum of these totals and the results of TrainingLoop.train_steps, which took `seconds`."""
        loss, correct, weight = steps.rows[:, 0], steps.rows[:, 1], steps.rows[:, 2]
        return EpochTotals(
            steps=self.steps + len(steps.rows),
            loss=self.loss + float((loss * weight).sum()),
            correct=self.correct + float(correct.sum()),
            examples=self.examples + float(weight.sum()),
            seconds=self.seconds + seconds,
            input_wait_seconds=self.input_wait_seconds + steps.input_wait_seconds,
        )


@dataclasses.dataclass(frozen=True)
class ProfileRange:
    """First and last step of an epoch, counted from 1, that are profiled into a TensorBoard folder.

    All workers run them in one call; on those without a `directory`, nothing is written.
    """

    directory: str
    first: int
    last: int

    @property
    def steps(self) -> int:
        """Number of profiled steps; they run in one call of train_steps."""
        return self.last - self.first + 1


# Duration of one call of train_steps: short enough for a live progress line and for a checkpoint within the 30 seconds'
# notice of a spot machine, long enough that the host does not delay the device.
SECONDS_PER_LOOP = 1.0


def train_epoch(
    loop: TrainingLoop,
    batches: Iterable,
    steps: int,
    totals: EpochTotals,
    *,
    steps_per_loop: int,
    stop_requested: Callable[[], StopReason],
    after_steps: Callable[[EpochTotals, bool], None],
    profile: ProfileRange | None = None,
) -> EpochTotals:
    """Runs an epoch from step `totals.steps` to its end. `steps_per_loop` 0 adapts to SECONDS_PER_LOOP.

    `after_steps(totals, is_stopped)` is called after each call of train_steps. Raises NonFiniteLossError, and
    TrainingInterrupted after the step at which any worker asks to stop.
    """
    started = time.monotonic()
    iterator = iter(batches)
    startup = time.monotonic() - started  # of the input, before its first batch
    totals = dataclasses.replace(
        totals, seconds=totals.seconds + startup, input_wait_seconds=totals.input_wait_seconds + startup
    )
    loop.trace(iterator)
    count = proposal = steps_per_loop or 1
    while totals.steps < steps:
        num_steps, profiling = min(count, steps - totals.steps), contextlib.nullcontext()
        if profile and totals.steps + 1 == profile.first:
            num_steps = profile.steps
            profiling = tf.profiler.experimental.Profile(profile.directory) if profile.directory else profiling
        elif profile and totals.steps + 1 < profile.first:
            num_steps = min(num_steps, profile.first - 1 - totals.steps)
        started = time.monotonic()
        with profiling:
            results = loop.train_steps(iterator, num_steps, stop_requested(), proposal)
        seconds = time.monotonic() - started
        losses = results.rows[:, 0]
        not_finite = np.flatnonzero(~np.isfinite(losses))
        if len(not_finite):
            raise NonFiniteLossError(totals.steps + int(not_finite[0]), float(losses[not_finite[0]]))
        totals = totals.add(results, seconds)
        reason = results.stop_reason
        after_steps(totals, reason != StopReason.NONE)
        if reason != StopReason.NONE:
            raise TrainingInterrupted(reason)
        if not steps_per_loop:
            # Calls of different lengths would not pair, and the workers would wait for each other for ever. All of them
            # therefore take the count of the chief, which arrives with the results of the steps, one call later.
            count = results.proposal
            proposal = int(np.clip(num_steps * SECONDS_PER_LOOP / max(seconds, 1e-3), 1, 2 * num_steps))
    return totals
