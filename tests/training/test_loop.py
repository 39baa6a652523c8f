"""The loop trains as Keras trains, keeps to its seed, and names the step that went wrong."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.data import input_pipeline, sampler
from trainer.models import resnet
from trainer.runtime.devices import Devices
from trainer.training.loop import (
    EpochTotals,
    ModelOutputs,
    NonFiniteLossError,
    TrainingLoop,
    evaluate_logits,
    train_epoch,
)
from trainer.training.optimizer import Recipe, learning_rate_schedule, make_optimizer

ONE = Devices(tf.distribute.get_strategy(), "CPU", ("CPU:0",), 1, 1, 0)
PLAIN = Recipe("sgd", 0.1, "constant", 0.0, 0.0, 0.0, 0.0, 0.0)
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(50, 6)).astype(np.float32)
LABELS = (FEATURES @ RNG.normal(size=(6, 3))).argmax(axis=1).astype(np.int32)
READABLE = np.ones(50, np.float32)


def make_loop(recipe=PLAIN, *, epochs=4, batch_size=8, seed=0, dropout=None, loss_scaling=False, xla=False):
    keras.utils.set_random_seed(1)
    inputs = keras.Input([6])
    network = resnet.with_head(keras.Model(inputs, keras.layers.Dense(16, "tanh")(inputs)), 3)
    steps = -(-50 // batch_size)
    optimizer = make_optimizer(recipe, epochs=epochs, steps_per_epoch=steps, loss_scaling=loss_scaling)
    loop = TrainingLoop(
        network.backbone,
        network.head,
        optimizer,
        devices=ONE,
        batch_size=batch_size,
        seed=seed,
        label_smoothing=recipe.label_smoothing,
        dropout=recipe.dropout if dropout is None else dropout,
        jit_compile=xla,
    )
    return network, loop


def layout_of(epoch, batch_size=8, class_weights=(1, 1, 1)):
    return sampler.shuffled_epoch(
        LABELS, seed=0, epoch=epoch, batch_size=batch_size, replicas=1, class_weights=np.float32(class_weights)
    )


def batches(layout, features=FEATURES, first_step=0):
    table = input_pipeline.ArraySource(tf.constant(features), tf.constant(READABLE))
    return input_pipeline.batches(layout, table, LABELS, transform=None, devices=ONE, first_step=first_step)


def run_epochs(loop, epochs=4, batch_size=8, **more):
    rows = []
    for epoch in range(epochs):
        layout = layout_of(epoch, batch_size)
        rows.append(loop.train_steps(iter(batches(layout, **more)), layout.steps, False).rows)
    return np.concatenate(rows)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_loop_gives_the_losses_and_weights_of_keras_fit(optimizer):
    recipe = PLAIN._replace(
        optimizer=optimizer, learning_rate=0.01, weight_decay=0.01, clip_norm=0.5, label_smoothing=0.1
    )
    network, loop = make_loop(recipe)
    ours = run_epochs(loop)
    theirs_network, _ = make_loop(recipe)
    theirs_network.model.compile(
        make_optimizer(recipe, epochs=4, steps_per_epoch=7, loss_scaling=False),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
    )
    losses = []
    for epoch in range(4):
        layout = layout_of(epoch)
        order = layout.index[layout.weight > 0]
        history = theirs_network.model.fit(
            FEATURES[order], np.eye(3)[LABELS[order]], batch_size=8, shuffle=False, verbose=0
        )
        losses += history.history["loss"]
    per_epoch = ours.reshape(4, 7, 4)
    mean = (per_epoch[..., 0] * per_epoch[..., 2]).sum(axis=1) / 50
    np.testing.assert_allclose(mean, losses, rtol=2e-5)
    for mine, theirs in zip(network.model.weights, theirs_network.model.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-6)


def test_training_learns():
    _, loop = make_loop(PLAIN._replace(optimizer="adam", learning_rate=0.02), epochs=30)
    run_epochs(loop, epochs=30)
    outputs = loop.logits(
        batches(sampler.ordered_epoch(50, batch_size=8, replicas=1)),
        sampler.ordered_epoch(50, batch_size=8, replicas=1),
    )
    assert evaluate_logits(outputs, LABELS, 0.0).accuracy > 0.95


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    dropped = PLAIN._replace(dropout=0.5)
    first, second, other = (run_epochs(make_loop(dropped, seed=seed)[1]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0


def test_dropout_drops_the_share_asked_for_and_keeps_the_mean():
    _, loop = make_loop(dropout=0.4, batch_size=50)
    batch = {"step": tf.zeros([50], tf.int64), "row": tf.range(50)}
    factors = loop._kept(batch).numpy()
    assert factors.shape == (50, 16)
    assert (factors == 0).mean() == pytest.approx(0.4, abs=0.03)
    assert factors.mean() == pytest.approx(1, abs=0.05)
    again = loop._kept({**batch, "row": tf.reverse(tf.range(50), [0])}).numpy()
    np.testing.assert_array_equal(again, factors[::-1])  # a row keeps its noise on whichever replica it lands


def test_training_leaves_frozen_statistics_alone_and_moves_the_others():
    def moved(trainable):
        keras.utils.set_random_seed(0)
        inputs = keras.Input([6])
        norm = keras.layers.BatchNormalization(momentum=0.5)
        norm.trainable = trainable
        network = resnet.with_head(keras.Model(inputs, keras.layers.Dense(4)(norm(inputs))), 3)
        optimizer = make_optimizer(PLAIN, epochs=1, steps_per_epoch=7, loss_scaling=False)
        loop = TrainingLoop(network.backbone, network.head, optimizer, devices=ONE, batch_size=8, seed=0)
        before = [weight.numpy() for weight in norm.weights]
        run_epochs(loop, 1)
        return [bool(np.abs(weight.numpy() - b).max() > 0) for weight, b in zip(norm.weights, before, strict=True)]

    assert moved(False) == [False] * 4
    assert moved(True) == [True] * 4


def test_a_learning_rate_rises_in_warm_up_and_falls_with_the_cosine():
    def rates(**changes):
        schedule = learning_rate_schedule(PLAIN._replace(**changes), epochs=4, steps_per_epoch=10)
        return schedule if isinstance(schedule, float) else np.array([schedule(step) for step in range(41)])

    assert rates() == 0.1
    cosine = rates(lr_schedule="cosine")
    np.testing.assert_allclose(cosine, 0.05 * (1 + np.cos(np.pi * np.arange(41) / 40)), atol=1e-6)
    warm = rates(lr_schedule="constant", warmup_epochs=0.5)
    np.testing.assert_allclose(warm, 0.1 * np.minimum(np.arange(41) / 5, 1), atol=1e-6)


def test_clipping_bounds_the_step_of_the_global_batch():
    network, loop = make_loop(PLAIN._replace(clip_norm=1e-3, learning_rate=1.0))
    before = [weight.numpy() for weight in network.model.trainable_weights]
    layout = layout_of(0)
    loop.train_steps(iter(batches(layout)), 1, False)
    moves = [weight.numpy() - b for weight, b in zip(network.model.trainable_weights, before, strict=True)]
    assert np.sqrt(sum((move**2).sum() for move in moves)) == pytest.approx(1e-3 * 1.0, rel=1e-3)


@pytest.mark.parametrize("steps_per_loop", [1, 3, 0])
def test_a_loss_that_is_no_number_names_its_step(steps_per_loop):
    layout = layout_of(0)
    features = FEATURES.copy()
    features[layout.index[4].ravel()[0]] = np.nan
    _, loop = make_loop()
    with pytest.raises(NonFiniteLossError, match="nan") as raised:
        train_epoch(
            loop,
            batches(layout, features),
            layout.steps,
            EpochTotals(),
            steps_per_loop=steps_per_loop,
            stop_requested=lambda: 0.0,
            after_loop=lambda totals, is_stopped: None,
        )
    assert raised.value.step == 4


def test_float16_steps_that_overflow_are_skipped_and_halve_the_loss_scale():
    network, loop = make_loop(PLAIN, loss_scaling=True)
    scale = loop.optimizer.dynamic_scale.numpy()
    before = [weight.numpy() for weight in network.model.weights]
    loop.train_steps(iter(batches(layout_of(0), FEATURES * np.float32(3e38))), 1, False)
    assert loop.optimizer.dynamic_scale.numpy() == scale / 2
    for weight, b in zip(network.model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), b)


def test_loss_scaling_does_not_change_the_numbers():
    plain, scaled = (run_epochs(make_loop(PLAIN, loss_scaling=scaling)[1]) for scaling in (False, True))
    np.testing.assert_allclose(plain, scaled, rtol=1e-5)


def test_xla_does_not_change_the_numbers():
    dropped = PLAIN._replace(dropout=0.3, clip_norm=1.0)
    plain, compiled = (run_epochs(make_loop(dropped, xla=xla)[1]) for xla in (False, True))
    np.testing.assert_allclose(plain, compiled, rtol=1e-4)


def test_a_wish_to_stop_ends_after_the_step_it_came_in():
    _, loop = make_loop()
    rows = loop.train_steps(iter(batches(layout_of(0))), 7, True).rows
    assert len(rows) == 1
    assert rows[0, 3] == 1


def test_pictures_that_cannot_be_read_do_not_count_in_the_validation():
    logits = np.array([[2.0, 0, 0], [0, 2, 0], [9, 0, 0]], np.float32)
    evaluation = evaluate_logits(ModelOutputs(logits, np.array([True, True, False])), np.array([0, 0, 1]), 0.0)
    assert evaluation.accuracy == 0.5
    expected = -np.log(np.exp([2.0, 0.0]) / (np.exp(2) + 2))
    assert evaluation.loss == pytest.approx(expected.mean(), rel=1e-6)


def test_validation_loss_is_that_of_keras_with_smoothing():
    logits = RNG.normal(size=(20, 3)).astype(np.float32)
    labels = np.arange(20) % 3
    keras_loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)(np.eye(3)[labels], logits)
    evaluation = evaluate_logits(ModelOutputs(logits, np.ones(20, bool)), labels, 0.2)
    assert evaluation.loss == pytest.approx(float(keras_loss), rel=1e-5)


def test_waiting_for_input_is_told_from_computing():
    _, loop = make_loop()
    layout = layout_of(0)

    def slowly(batch):
        def late(x: np.ndarray) -> np.ndarray:
            time.sleep(0.05)
            return x

        x = tf.ensure_shape(tf.numpy_function(late, [batch["x"]], tf.float32), batch["x"].shape)
        return {**batch, "x": x}

    def run(slow: bool) -> EpochTotals:
        dataset = batches(layout).map(slowly) if slow else batches(layout)
        return train_epoch(
            loop,
            dataset,
            layout.steps,
            EpochTotals(),
            steps_per_loop=layout.steps,
            stop_requested=lambda: 0.0,
            after_loop=lambda totals, is_stopped: None,
        )

    run(False)  # so that graphs are built
    fast, slow = run(False), run(True)
    assert slow.input_wait_seconds > 0.05 * layout.steps * 0.9
    assert slow.seconds - slow.input_wait_seconds < slow.input_wait_seconds / 2  # seven steps of a tiny network
    assert fast.input_wait_seconds < slow.input_wait_seconds / 2
