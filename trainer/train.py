"""Steps and epochs on any number of replicas, with the same numbers on each number of them.

Shapes: N examples, B in a global batch, R replicas, b of B in a replica, F features, C classes.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer import checkpoint
from trainer.data import Epoch
from trainer.devices import Devices
from trainer.errors import UserError


class Recipe(NamedTuple):
    """How a stage is trained; `learning_rate` is the peak one."""

    optimizer: str
    learning_rate: float
    lr_schedule: str
    warmup_epochs: float
    weight_decay: float
    clip_norm: float
    label_smoothing: float
    dropout: float


def make_optimizer(recipe: Recipe, *, epochs: int, steps_per_epoch: int, loss_scaling: bool) -> keras.Optimizer:
    """The Keras optimizer of a recipe; `loss_scaling` is for float16, whose small gradients would vanish."""
    kinds = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD}
    arguments: dict[str, float | None] = {"momentum": 0.9} if recipe.optimizer == "sgd" else {}
    if recipe.weight_decay or recipe.optimizer != "adamw":  # AdamW brings a weight decay of its own
        arguments["weight_decay"] = recipe.weight_decay or None
    optimizer = kinds[recipe.optimizer](
        learning_rate_schedule(recipe, epochs=epochs, steps_per_epoch=steps_per_epoch),
        global_clipnorm=recipe.clip_norm or None,
        **arguments,
    )
    # The loop sums the gradients of the replicas up itself, so that clipping and the test for overflow see those of the
    # global batch; Keras would do both on each replica's own and sum up afterwards (keras 3.15).
    optimizer._all_reduce_sum_gradients = list
    return keras.optimizers.LossScaleOptimizer(optimizer) if loss_scaling else optimizer


def learning_rate_schedule(recipe: Recipe, *, epochs: int, steps_per_epoch: int) -> Any:
    """A number, or a Keras schedule from optimizer steps to the learning rate: linear warm-up, then constant or cosine."""
    warmup_steps = round(recipe.warmup_epochs * steps_per_epoch)
    if recipe.lr_schedule == "constant" and not warmup_steps:
        return recipe.learning_rate
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else recipe.learning_rate,
        max(1, epochs * steps_per_epoch - warmup_steps),
        alpha=1.0 if recipe.lr_schedule == "constant" else 0.0,  # a cosine that ends where it began is constant
        warmup_target=recipe.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


class Loop:
    """Trains and evaluates `head` behind `backbone` (None: the examples are features already) on all replicas.

    Batches are what trainer.data.batches gives. To be made after the networks, outside of any strategy scope.
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
    ):
        self.backbone, self.head, self.optimizer = backbone, head, optimizer
        self._devices, self._batch_size, self._seed, self._dropout = devices, batch_size, seed, dropout
        self._loss = keras.losses.CategoricalCrossentropy(True, label_smoothing, reduction=None)
        networks = [network for network in (backbone, head) if network is not None]
        self._trainable = [variable for network in networks for variable in network.trainable_variables]
        with devices.strategy.scope():
            optimizer.build(self._trainable)
        # A constant learning rate is a variable too; it comes from the flags, or halved from them, not from a save.
        state = [variable for variable in optimizer.variables if variable.name != "learning_rate"]
        self.variables = {
            **checkpoint.named("network", [variable for network in networks for variable in network.variables]),
            **checkpoint.named("optimizer", state),
        }
        gradients = tf.function(self._gradients, jit_compile=True) if jit_compile else self._gradients
        self._replica_step = lambda batch, stop: self._step(gradients, batch, stop)
        self._train_steps = tf.function(self._steps, reduce_retracing=True)
        self._infer: Callable | None = None

    def trace(self, iterator: Iterator) -> None:
        """Builds the graph of train_steps for such batches, once; without it the first call does."""
        self._train_steps.get_concrete_function(iterator, tf.constant(1), tf.constant(0.0))

    def train_steps(self, iterator: Iterator, count: int, stop: float) -> "Steps":
        """Runs up to `count` steps; with several workers all end after the same step if any passed another `stop` than 0."""
        rows, waited = self._train_steps(iterator, tf.constant(count), tf.constant(float(stop)))
        return Steps(rows.numpy().astype(np.float64), float(waited.numpy()))

    def _steps(self, iterator: Iterator, count: tf.Tensor, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        rows = tf.TensorArray(tf.float32, 0, dynamic_size=True, element_shape=[4])
        is_stopped = tf.constant(False)
        done, waited = tf.constant(0), tf.constant(0.0, tf.float64)
        while done < count and not is_stopped:
            batch, seconds = self._next_timed(iterator)
            result = self._devices.strategy.run(self._replica_step, args=(batch, stop))
            row = self._devices.strategy.experimental_local_results(result)[0]  # summed up: the same on each
            rows = rows.write(done, row)
            is_stopped = row[3] > 0
            done, waited = done + 1, waited + seconds
        return rows.stack(), waited

    def _next_timed(self, iterator: Iterator) -> tuple[dict, tf.Tensor]:
        """The next batch, and the seconds (float64) for which nothing but the input was waited for.

        A graph has no order but the one it is given. The clock starts once the step before is done: its row is known,
        since the loop's condition needs it, and the first layer's weights, whose gradient comes last, have moved.
        """
        with tf.control_dependencies([tf.convert_to_tensor(self._trainable[0])]):
            started = tf.timestamp()
        with tf.control_dependencies([started]):
            batch = next(iterator)
        local = (self._devices.strategy.experimental_local_results(value) for value in batch.values())
        with tf.control_dependencies([part for parts in local for part in parts]):
            return batch, tf.timestamp() - started

    def _step(self, gradients: Callable, batch: dict[str, tf.Tensor], stop: tf.Tensor) -> tf.Tensor:
        scale = self.optimizer.scale_loss(tf.constant(1.0))
        loss, correct, grads = gradients(batch, self._kept(batch), scale)
        row = tf.stack([loss, correct, tf.reduce_sum(batch["weight"]), stop])
        if self._devices.replicas > 1:
            context = tf.distribute.get_replica_context()
            *grads, row = context.all_reduce(tf.distribute.ReduceOp.SUM, [*grads, row])
        self.optimizer.apply(grads, self._trainable)
        return row

    def _gradients(
        self, batch: dict[str, tf.Tensor], kept: tf.Tensor, scale: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, list]:
        """This replica's share of loss and correct answers, and the gradients of the share times `scale`."""
        with tf.GradientTape() as tape:
            features = self.backbone(batch["x"], training=True) if self.backbone else batch["x"]
            logits = self.head(features * tf.cast(kept, features.dtype), training=True)
            targets = tf.one_hot(batch["label"], logits.shape[-1])
            # Over the batch the weights sum up to 1, so the replicas' shares just add up to the mean.
            loss = tf.reduce_sum(self._loss(targets, logits) * batch["loss_weight"])
            scaled = loss * scale
        is_correct = tf.argmax(logits, -1, tf.int32) == batch["label"]
        correct = tf.reduce_sum(tf.cast(is_correct, tf.float32) * batch["weight"])
        return loss, correct, tape.gradient(scaled, self._trainable)

    def _kept(self, batch: dict[str, tf.Tensor]) -> tf.Tensor:
        """Dropout's factors of the features, float32 [b, F], of seed, step and row alone; without dropout just 1.

        A Keras Dropout layer keeps its random state to itself, per replica and not in checkpoints. Here each replica
        draws the noise of the whole global batch and takes the rows that are its own; outside of what XLA compiles,
        since XLA draws other numbers from the same seed.
        """
        if not self._dropout:
            return tf.constant(1.0)
        seed = tf.stack([tf.constant(self._seed, tf.int64), batch["step"][0]])
        noise = tf.random.stateless_uniform([self._padded_batch_size(), self.head.input_shape[-1]], seed)
        is_kept = tf.gather(noise, batch["row"]) >= self._dropout
        return tf.cast(is_kept, tf.float32) / (1 - self._dropout)

    def _padded_batch_size(self) -> int:
        return -(-self._batch_size // self._devices.replicas) * self._devices.replicas

    def logits(self, batches: Iterable, epoch: Epoch, **watch: Callable) -> "Outputs":
        """Logits float32 [N, C] of one pass, on all replicas; `watch` as for collect."""
        if self._infer is None:  # traced once, not for each epoch
            backbone, head = self.backbone, self.head
            self._infer = inference((lambda x: head(backbone(x, training=False))) if backbone else head, self._devices)
        return collect(self._infer, batches, epoch, **watch)


class Steps(NamedTuple):
    """What some steps gave: float64 [steps, 4] of loss, correct, weight, workers that want to stop; seconds of waiting."""

    rows: np.ndarray
    input_wait_seconds: float


class Outputs(NamedTuple):
    """Of N examples in their order: float32 [N, width], and bool [N], false where the picture could not be read."""

    values: np.ndarray
    is_readable: np.ndarray


def inference(network: Callable[[tf.Tensor], tf.Tensor], devices: Devices) -> Callable:
    """A compiled function (batch, stop) -> float32 [R * b, width + 2]: output, weight of the row, wish to stop."""

    def replica_infer(batch: dict[str, tf.Tensor], stop: tf.Tensor) -> tf.Tensor:
        output = tf.cast(network(batch["x"]), tf.float32)
        weight = batch["weight"][:, None]
        output = tf.concat([output, weight, tf.fill(tf.shape(weight), stop)], axis=1)
        if devices.replicas > 1:
            output = tf.distribute.get_replica_context().all_gather(output, axis=0)
        return output

    @tf.function(reduce_retracing=True)
    def infer(batch: Any, stop: tf.Tensor) -> tf.Tensor:
        return devices.strategy.experimental_local_results(devices.strategy.run(replica_infer, args=(batch, stop)))[0]

    return infer


def collect(
    infer: Callable,
    batches: Iterable,
    epoch: Epoch,
    *,
    on_batch: Callable[[int], None] = lambda examples: None,
    wish_to_stop: Callable[[], float] = lambda: 0.0,
) -> Outputs:
    """Runs `infer` over one pass, telling `on_batch` the examples done. Raises Stopped once any worker wants to stop."""
    num_examples = int(epoch.weight.sum())
    values, is_readable = None, np.zeros(num_examples, bool)
    for step, batch in enumerate(batches):
        output = infer(batch, tf.constant(wish_to_stop())).numpy()
        if output[:, -1].any():
            raise Stopped(by_signal=output[:, -1].max() >= BY_SIGNAL)
        is_real = epoch.weight[step].reshape(-1) > 0
        index = epoch.index[step].reshape(-1)[is_real]
        if values is None:
            values = np.zeros((num_examples, output.shape[1] - 2), np.float32)
        values[index] = output[is_real, :-2]
        is_readable[index] = output[is_real, -2] > 0
        on_batch(len(index))
    if values is None:
        raise ValueError("a pass without a batch")
    return Outputs(values, is_readable)


class Validation(NamedTuple):
    """What the network says of the validation pictures: probabilities float32 [V, C]; unreadable ones are masked out."""

    loss: float
    accuracy: float
    probabilities: np.ndarray
    is_readable: np.ndarray


def validate(outputs: Outputs, labels: np.ndarray, label_smoothing: float) -> Validation:
    """Loss and accuracy in float64 on the host, so that they do not depend on how replicas shared the pictures."""
    logits, is_readable = outputs
    if not is_readable.any():
        raise UserError("None of the validation pictures can be decoded any more: check --data_dir.")
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    num_classes = logits.shape[1]
    of_label = log_probabilities[np.arange(len(labels)), labels]
    losses = -(1 - label_smoothing) * of_label - label_smoothing / num_classes * log_probabilities.sum(axis=1)
    is_correct = logits.argmax(axis=1) == labels
    return Validation(
        float(losses[is_readable].mean()),
        float(is_correct[is_readable].mean()),
        np.exp(log_probabilities).astype(np.float32),
        is_readable,
    )


def find_stranger(mine: str, devices: Devices) -> int | None:
    """The index of the first replica, over all workers, whose `mine` is another text than the first one's, or None.

    Every worker calls it at the same point; it is how a worker of other flags or other pictures is found.
    """
    digest = np.frombuffer(hashlib.sha256(mine.encode()).digest(), np.int64)[None]

    @tf.function
    def gather() -> tf.Tensor:
        def replica_gather() -> tf.Tensor:
            return tf.distribute.get_replica_context().all_gather(tf.constant(digest), axis=0)

        return devices.strategy.experimental_local_results(devices.strategy.run(replica_gather))[0]

    digests = gather().numpy() if devices.replicas > 1 else digest
    strange = np.flatnonzero((digests != digests[0]).any(axis=1))
    return int(strange[0]) if len(strange) else None


class NotFinite(ArithmeticError):
    """The loss of a step is no number any more; `step` counts from 0 within the epoch."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss is {loss}")
        self.step = step


# Why a worker wants to stop, 0 for not at all. The wishes of all replicas are summed up, or the largest is taken: signals
# outweigh any number of reached limits.
BY_SIGNAL, BY_COST = 1.0, 2.0**-20


class Stopped(Exception):
    """The end came early, by a signal to any of the workers or since the job has cost what it may; everything is saved."""

    def __init__(self, *, by_signal: bool):
        super().__init__("stopped")
        self.by_signal = by_signal


class Totals(NamedTuple):
    """What an epoch has added up so far; all of it goes into a checkpoint."""

    steps: int = 0
    loss: float = 0.0  # sum over the examples
    correct: float = 0.0
    examples: float = 0.0
    seconds: float = 0.0  # of steps, waiting for input included; building the graph once is not
    input_wait_seconds: float = 0.0

    def add(self, steps: Steps, seconds: float) -> "Totals":
        """With the steps of Loop.train_steps added."""
        loss, correct, weight = steps.rows[:, 0], steps.rows[:, 1], steps.rows[:, 2]
        return Totals(
            self.steps + len(steps.rows),
            self.loss + float((loss * weight).sum()),
            self.correct + float(correct.sum()),
            self.examples + float(weight.sum()),
            self.seconds + seconds,
            self.input_wait_seconds + steps.input_wait_seconds,
        )


class Profile(NamedTuple):
    """Steps of an epoch, from 1 on and both included, whose TensorFlow profile goes below a TensorBoard folder."""

    directory: str
    first: int
    last: int

    @property
    def steps(self) -> int:
        """How many they are; they make one round."""
        return self.last - self.first + 1


# One call of train_steps lasts about this long: often enough for a live progress line and for a signal to be noticed
# with half a minute's notice, seldom enough that the host does not hold the device up.
SECONDS_PER_LOOP = 1.0


def train_epoch(
    loop: Loop,
    batches: Iterable,
    steps: int,
    totals: Totals,
    *,
    steps_per_loop: int,
    wish_to_stop: Callable[[], float],
    after_loop: Callable[[Totals, bool], None],
    profile: Profile | None = None,
) -> Totals:
    """Runs the epoch to its end from `totals.steps` on. `steps_per_loop` 0 adapts to SECONDS_PER_LOOP.

    `after_loop(totals, is_stopped)` is called after each round of steps. Raises NotFinite, and Stopped after the round
    in which any worker wanted to stop.
    """
    started = time.monotonic()
    iterator = iter(batches)
    starting = time.monotonic() - started  # of the input, before its first batch
    totals = totals._replace(seconds=totals.seconds + starting, input_wait_seconds=totals.input_wait_seconds + starting)
    loop.trace(iterator)
    count = steps_per_loop or 1
    while totals.steps < steps:
        round_steps, profiling = min(count, steps - totals.steps), contextlib.nullcontext()
        if profile and totals.steps + 1 == profile.first:
            round_steps, profiling = profile.steps, tf.profiler.experimental.Profile(profile.directory)
        elif profile and totals.steps + 1 < profile.first:
            round_steps = min(round_steps, profile.first - 1 - totals.steps)
        started = time.monotonic()
        with profiling:
            done = loop.train_steps(iterator, round_steps, wish_to_stop())
        seconds = time.monotonic() - started
        losses = done.rows[:, 0]
        wrong = np.flatnonzero(~np.isfinite(losses))
        if len(wrong):
            raise NotFinite(totals.steps + int(wrong[0]), float(losses[wrong[0]]))
        totals = totals.add(done, seconds)
        is_stopped = bool(done.rows[-1, 3] > 0)
        after_loop(totals, is_stopped)
        if is_stopped:
            raise Stopped(by_signal=done.rows[-1, 3] >= BY_SIGNAL)
        if not steps_per_loop:
            count = int(np.clip(count * SECONDS_PER_LOOP / max(seconds, 1e-3), 1, 2 * count))
    return totals
