"""The training loop compared with Keras' own, and its randomness, precision, timing and errors."""

import dataclasses
import os
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.paths import ROOT
from trainer import cli
from trainer.data import input_pipeline, sampler
from trainer.errors import UserError
from trainer.models import networks
from trainer.models.networks import Network
from trainer.runtime.devices import Devices
from trainer.training.inference import ModelOutputs, evaluate_logits
from trainer.training.interruption import StopReason, TrainingInterrupted
from trainer.training.loop import EpochTotals, NonFiniteLossError, ProfileRange, TrainingLoop, train_epoch
from trainer.training.optimizer import Recipe, make_optimizer

ONE_CPU = Devices(
    strategy=tf.distribute.get_strategy(), kind="CPU", names=("CPU:0",), replicas=1, local_replicas=1, first_replica=0
)
SGD = Recipe(optimizer="sgd", learning_rate=0.1)
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(50, 6)).astype(np.float32)
LABELS = (FEATURES @ RNG.normal(size=(6, 3))).argmax(axis=1).astype(np.int32)


def make_loop(
    recipe=SGD, *, epochs=4, batch_size=8, seed=0, loss_scaling=False, xla=False, accumulate_steps=1, layers=()
) -> tuple[Network, TrainingLoop]:
    keras.utils.set_random_seed(1)
    inputs = keras.Input([6])
    features = keras.layers.Dense(16, "tanh")(inputs)
    for layer in layers:
        features = layer(features)
    network = networks.with_head(keras.Model(inputs, features), 3)
    steps = sampler.steps_per_epoch(50, batch_size)
    loop = TrainingLoop(
        network.backbone,
        network.head,
        make_optimizer(recipe, epochs=epochs, steps_per_epoch=steps, loss_scaling=loss_scaling),
        devices=ONE_CPU,
        batch_size=batch_size,
        seed=seed,
        label_smoothing=recipe.label_smoothing,
        dropout=recipe.dropout,
        jit_compile=xla,
        accumulate_steps=accumulate_steps,
    )
    return network, loop


def make_plan(epoch: int) -> sampler.EpochPlan:
    return sampler.shuffled_epoch(
        LABELS, seed=0, epoch=epoch, batch_size=8, replicas=1, class_weights=np.ones(3, np.float32)
    )


def make_batches(plan, features=FEATURES):
    source = input_pipeline.ArraySource(tf.constant(features), tf.ones([50]))
    return input_pipeline.batches(plan, source, LABELS, transform=None, devices=ONE_CPU)


def run_epochs(loop: TrainingLoop, epochs: int = 4) -> np.ndarray:
    """Trains; returns the rows of all steps."""
    rows = []
    for epoch in range(epochs):
        plan = make_plan(epoch)
        rows.append(loop.train_steps(iter(make_batches(plan)), plan.steps).rows)
    return np.concatenate(rows)


def run_epoch(loop: TrainingLoop, batches, *, steps_per_loop: int, **options) -> EpochTotals:
    """train_epoch over the whole first epoch."""
    arguments = {"stop_requested": lambda: StopReason.NONE, "after_steps": lambda totals, is_stopped: None, **options}
    return train_epoch(loop, batches, make_plan(0).steps, EpochTotals(), steps_per_loop=steps_per_loop, **arguments)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_losses_and_weights_equal_those_of_keras_fit(optimizer):
    recipe = Recipe(optimizer=optimizer, learning_rate=0.01, weight_decay=0.01, clip_norm=0.5, label_smoothing=0.1)
    network, loop = make_loop(recipe)
    rows = run_epochs(loop).reshape(4, 7, -1)
    keras_network, _ = make_loop(recipe)
    keras_network.model.compile(
        make_optimizer(recipe, epochs=4, steps_per_epoch=7, loss_scaling=False),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
    )
    keras_losses = []
    for epoch in range(4):
        plan = make_plan(epoch)
        order = plan.index[plan.weight > 0]
        history = keras_network.model.fit(
            FEATURES[order], np.eye(3)[LABELS[order]], batch_size=8, shuffle=False, verbose=0
        )
        keras_losses += history.history["loss"]
    losses = (rows[..., 0] * rows[..., 2]).sum(axis=1) / 50
    np.testing.assert_allclose(losses, keras_losses, rtol=2e-5)
    for weight, keras_weight in zip(network.model.weights, keras_network.model.weights, strict=True):
        np.testing.assert_allclose(weight.numpy(), keras_weight.numpy(), rtol=1e-4, atol=1e-6)


def test_training_reaches_a_high_accuracy():
    _, loop = make_loop(Recipe(optimizer="adam", learning_rate=0.02), epochs=30)
    run_epochs(loop, epochs=30)
    plan = sampler.ordered_epoch(50, batch_size=8, replicas=1)
    outputs = loop.logits(make_batches(plan), plan)
    assert evaluate_logits(outputs, LABELS, 0.0).accuracy > 0.95


def test_the_seed_decides_the_numbers():
    recipe = dataclasses.replace(SGD, dropout=0.5)
    first, second, other = (run_epochs(make_loop(recipe, seed=seed)[1]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0


def test_dropout_drops_its_fraction_and_keeps_the_mean():
    _, loop = make_loop(dataclasses.replace(SGD, dropout=0.4), batch_size=50)
    batch = {"step": tf.zeros([50], tf.int64), "row": tf.range(50)}
    factors = loop._dropout_factors(batch).numpy()
    assert factors.shape == (50, 16)
    assert (factors == 0).mean() == pytest.approx(0.4, abs=0.03)
    assert factors.mean() == pytest.approx(1, abs=0.05)
    reversed_factors = loop._dropout_factors({**batch, "row": tf.reverse(tf.range(50), [0])}).numpy()
    np.testing.assert_array_equal(reversed_factors, factors[::-1])  # a row has the same noise on any replica


@pytest.mark.parametrize("trainable", [False, True])
def test_training_changes_batch_statistics_unless_they_are_frozen(trainable):
    inputs = keras.Input([6])
    norm = keras.layers.BatchNormalization(momentum=0.5)
    norm.trainable = trainable
    network = networks.with_head(keras.Model(inputs, keras.layers.Dense(4)(norm(inputs))), 3)
    optimizer = make_optimizer(SGD, epochs=1, steps_per_epoch=7, loss_scaling=False)
    loop = TrainingLoop(network.backbone, network.head, optimizer, devices=ONE_CPU, batch_size=8, seed=0)
    before = [weight.numpy() for weight in norm.weights]
    run_epochs(loop, epochs=1)
    changes = [np.abs(weight.numpy() - old).max() for weight, old in zip(norm.weights, before, strict=True)]
    assert [change > 0 for change in changes] == [trainable] * 4


def test_validation_is_that_of_the_weights_of_each_epoch_without_batch_normalization(monkeypatch):
    network, loop = make_loop(
        layers=[
            keras.layers.Reshape([4, 4, 1]),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Flatten(),
        ]
    )
    plan = sampler.ordered_epoch(50, batch_size=8, replicas=1)
    results = []
    for _ in range(2):
        run_epochs(loop, epochs=1)
        expected = network.head(network.backbone(FEATURES, training=False)).numpy()
        with monkeypatch.context() as patch:
            patch.setattr(keras.layers.BatchNormalization, "call", None)
            results.append(loop.logits(make_batches(plan), plan).values)
        np.testing.assert_allclose(results[-1], expected, atol=1e-5)
    assert np.abs(results[1] - results[0]).max() > 1e-3


def test_clipping_limits_the_update_by_the_global_batch():
    network, loop = make_loop(dataclasses.replace(SGD, clip_norm=1e-3, learning_rate=1.0))
    before = [weight.numpy() for weight in network.model.trainable_weights]
    loop.train_steps(iter(make_batches(make_plan(0))), 1)
    changes = [weight.numpy() - old for weight, old in zip(network.model.trainable_weights, before, strict=True)]
    assert np.sqrt(sum((change**2).sum() for change in changes)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("steps_per_loop", [1, 3, 0])
def test_a_non_finite_loss_is_an_error_with_its_step(steps_per_loop):
    plan, features = make_plan(0), FEATURES.copy()
    features[plan.index[4].ravel()[0]] = np.nan
    _, loop = make_loop()
    with pytest.raises(NonFiniteLossError, match="nan") as raised:
        run_epoch(loop, make_batches(plan, features), steps_per_loop=steps_per_loop)
    assert raised.value.step == 4


def test_float16_steps_that_overflow_are_skipped_and_halve_the_scale():
    network, loop = make_loop(loss_scaling=True)
    scale = loop.optimizer.dynamic_scale.numpy()
    before = [weight.numpy() for weight in network.model.weights]
    loop.train_steps(iter(make_batches(make_plan(0), FEATURES * np.float32(3e38))), 1)
    assert loop.optimizer.dynamic_scale.numpy() == scale / 2
    for weight, old in zip(network.model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)


def test_loss_scaling_does_not_change_the_numbers():
    plain, scaled = (run_epochs(make_loop(loss_scaling=loss_scaling)[1]) for loss_scaling in (False, True))
    np.testing.assert_allclose(plain, scaled, rtol=1e-5)


def test_xla_does_not_change_the_numbers():
    recipe = dataclasses.replace(SGD, dropout=0.3, clip_norm=1.0)
    plain, compiled = (run_epochs(make_loop(recipe, xla=xla)[1]) for xla in (False, True))
    np.testing.assert_allclose(plain, compiled, rtol=1e-4)


@pytest.mark.parametrize("xla", [False, True])
def test_a_batch_in_parts_gives_the_same_numbers(xla):
    recipe = dataclasses.replace(SGD, dropout=0.3, clip_norm=1.0, label_smoothing=0.1)
    whole, parts = (run_epochs(make_loop(recipe, xla=xla, accumulate_steps=n)[1]) for n in (1, 4))
    np.testing.assert_allclose(whole, parts, rtol=1e-5)


class TooLargeAbove2(keras.layers.Layer):
    """The identity, which needs 128 TiB for more than two examples."""

    def call(self, x):
        return x + tf.reduce_sum(tf.fill([2**45], x[0, 0])) if x.shape[0] and x.shape[0] > 2 else x


def test_the_number_of_parts_is_doubled_until_they_fit_in_memory(caplog):
    caplog.set_level("INFO", logger="absl")
    _, loop = make_loop(layers=[TooLargeAbove2()])
    assert loop.choose_accumulate_steps((6,), "float32") == 4
    assert [record.getMessage()[-19:] for record in caplog.records] == ["accumulate_steps=2.", "accumulate_steps=4."]
    np.testing.assert_allclose(run_epochs(loop), run_epochs(make_loop()[1]), rtol=1e-5)


def test_without_parts_too_little_memory_is_the_users_error():
    _, loop = make_loop(layers=[TooLargeAbove2()])
    with pytest.raises(tf.errors.ResourceExhaustedError) as raised:
        run_epochs(loop)
    assert "There is not enough memory for" in str(cli.memory_error(raised.value))


def test_what_cudnn_reports_without_memory_is_the_users_error():
    reason = "No algorithm worked!  Error messages:  Profiling failure on CUDNN engine eng0: CUDNN_STATUS_ALLOC_FAILED"
    assert "There is not enough memory for" in str(cli.memory_error(tf.errors.NotFoundError(None, None, reason)))
    assert cli.memory_error(tf.errors.NotFoundError(None, None, "no such file")) is None


def test_parts_that_would_not_be_equal_are_refused():
    with pytest.raises(UserError, match="each device computes 8 images of the batch, which cannot be divided into 3"):
        make_loop(accumulate_steps=3)


@pytest.mark.parametrize("reason", [StopReason.COST_LIMIT, StopReason.SIGNAL])
def test_a_reason_to_stop_ends_the_steps_after_the_current_one(reason):
    _, loop = make_loop()
    results = loop.train_steps(iter(make_batches(make_plan(0))), 7, reason)
    assert len(results.rows) == 1
    assert results.stop_reason == reason


def test_without_a_reason_to_stop_all_steps_run():
    results = make_loop()[1].train_steps(iter(make_batches(make_plan(0))), 7)
    assert len(results.rows) == 7
    assert results.stop_reason == StopReason.NONE


@pytest.mark.parametrize("pass_over", ["training", "validation"])
def test_a_pass_that_is_interrupted_raises_its_reason(pass_over):
    _, loop = make_loop()
    reasons = iter([StopReason.NONE, StopReason.SIGNAL])

    def stop_requested() -> StopReason:
        return next(reasons)

    with pytest.raises(TrainingInterrupted) as raised:
        if pass_over == "training":
            run_epoch(loop, make_batches(make_plan(0)), steps_per_loop=1, stop_requested=stop_requested)
        else:
            plan = sampler.ordered_epoch(50, batch_size=8, replicas=1)
            loop.logits(make_batches(plan), plan, stop_requested=stop_requested)
    assert raised.value.reason == StopReason.SIGNAL


@pytest.mark.parametrize("steps_per_loop", [1, 2, 0])
def test_profiled_steps_run_in_one_call(steps_per_loop, monkeypatch):
    profiled_after, calls, (_, loop) = [], [], make_loop()

    class Profile:
        def __init__(self, directory: str):
            assert directory == "logs"

        def __enter__(self):
            profiled_after.append(calls[-1].steps if calls else 0)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(tf.profiler.experimental, "Profile", Profile)
    run_epoch(
        loop,
        make_batches(make_plan(0)),
        steps_per_loop=steps_per_loop,
        after_steps=lambda totals, is_stopped: calls.append(totals),
        profile=ProfileRange("logs", first=2, last=5),
    )
    ends = [totals.steps for totals in calls]
    assert profiled_after == [1]
    assert ends[ends.index(1) + 1] == 5
    assert ends[-1] == 7


def test_validation_leaves_out_unreadable_images():
    logits = np.array([[2.0, 0, 0], [0, 2, 0], [9, 0, 0]], np.float32)
    validation = evaluate_logits(ModelOutputs(logits, np.array([True, True, False])), np.array([0, 0, 1]), 0.0)
    assert validation.accuracy == 0.5
    expected = -np.log(np.exp([2.0, 0.0]) / (np.exp(2) + 2))
    assert validation.loss == pytest.approx(expected.mean(), rel=1e-6)


def test_validation_without_a_readable_image_is_an_error():
    with pytest.raises(UserError, match="No validation image can be decoded"):
        evaluate_logits(ModelOutputs(np.zeros((2, 3), np.float32), np.zeros(2, bool)), np.zeros(2, int), 0.0)


def test_the_validation_loss_equals_that_of_keras():
    logits = RNG.normal(size=(20, 3)).astype(np.float32)
    labels = np.arange(20) % 3
    keras_loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)(np.eye(3)[labels], logits)
    validation = evaluate_logits(ModelOutputs(logits, np.ones(20, bool)), labels, 0.2)
    assert validation.loss == pytest.approx(float(keras_loss), rel=1e-5)


def test_waiting_for_input_is_measured_apart_from_computing():
    plan, (_, loop) = make_plan(0), make_loop()

    def delay(batch):
        def sleep(x: np.ndarray) -> np.ndarray:
            time.sleep(0.05)
            return x

        x = tf.ensure_shape(tf.numpy_function(sleep, [batch["x"]], tf.float32), batch["x"].shape)
        return {**batch, "x": x}

    def run(*, is_slow: bool) -> EpochTotals:
        batches = make_batches(plan)
        return run_epoch(loop, batches.map(delay) if is_slow else batches, steps_per_loop=plan.steps)

    run(is_slow=False)  # builds the graphs
    fast, slow = run(is_slow=False), run(is_slow=True)
    assert slow.input_wait_seconds > 0.05 * plan.steps * 0.9
    assert slow.seconds - slow.input_wait_seconds < slow.input_wait_seconds / 2  # seven steps of a tiny network
    assert fast.input_wait_seconds < slow.input_wait_seconds / 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are not bound to a core on this system")
def test_on_one_core_computing_is_not_taken_for_waiting():
    """TensorFlow then has one thread for operations; it counts the cores when it is imported."""
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from tests.training.test_loop import print_wait_share; print_wait_share()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 0.5


def print_wait_share() -> None:
    """Prints the share of an epoch that a network which is slow to compute waits for its input, which is in memory."""
    _, loop = make_loop(layers=[keras.layers.Dense(4000, "relu") for _ in range(3)])
    run_epoch(loop, make_batches(make_plan(0)), steps_per_loop=make_plan(0).steps)  # builds the graphs
    totals = run_epoch(loop, make_batches(make_plan(0)), steps_per_loop=make_plan(0).steps)
    print(totals.input_wait_seconds / totals.seconds)
