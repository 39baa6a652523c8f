"""Trains a small network on a picture folder for some steps and leaves every number in a file.

    python replica_run.py FOLDER OUTPUT.npz --devices=2 --precision=float32 --optimizer=sgd

Run as one process, or as one of several workers by TF_CONFIG; the tests compare what they leave. Not a test itself.
"""

import argparse
import os

from trainer import cli
from trainer.data import sampler
from trainer.data.dataset import read_folder
from trainer.runtime import cluster
from trainer.training.loop import TrainingLoop, evaluate_logits
from trainer.training.optimizer import Recipe, make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--network", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--steps_per_loop", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--still", type=int, default=0, help="1: batch statistics are not trained")
    parser.add_argument("--xla", type=int, default=0)
    flags = parser.parse_args()
    me = cluster.resolve(os.environ)
    os.environ["TF_CONFIG"] = cluster.tf_config(me)
    cli.import_tensorflow()
    import numpy as np
    import tensorflow as tf

    from trainer.data import input_pipeline
    from trainer.runtime import devices

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * flags.devices)
    machine = devices.start(me, require_gpu=False)
    with machine.strategy.scope():
        network = make_network(flags.network, flags.precision, trains_statistics=not flags.still)
        recipe = Recipe(flags.optimizer, 0.01, "cosine", 1.0, 1e-3, 1.0, 0.1, 0.3)
        optimizer = make_optimizer(recipe, epochs=4, steps_per_epoch=8, loss_scaling=flags.precision == "mixed_float16")
        if flags.precision == "mixed_float16":
            # Keras begins with 2^15 and skips the step at which a gradient then overflows. Half a batch's gradient, which
            # its other half cancels, does so sooner than the whole one's, and a step that one run skips tells nothing.
            optimizer.initial_scale = 2.0**10
    training_loop = TrainingLoop(
        network.backbone,
        network.head,
        optimizer,
        devices=machine,
        batch_size=flags.batch_size,
        seed=7,
        label_smoothing=recipe.label_smoothing,
        dropout=recipe.dropout,
        jit_compile=bool(flags.xla),
    )
    images = read_folder(flags.folder).examples
    is_validation = np.zeros(len(images), bool)
    is_validation[[0, 30, 60]] = True  # 3 to validate, 61 to train on: neither divides by anything here
    training, validation = images.take(~is_validation), images.take(is_validation)
    assert (len(training), len(validation)) == (61, 3)

    def batches(layout, side, epoch):
        finish = input_pipeline.BatchTransform(
            "rescale", None if epoch is None else (7, epoch), network.backbone.compute_dtype
        )
        found_files = input_pipeline.FileSource(flags.folder, side.paths, 32, print)
        return input_pipeline.batches(layout, found_files, side.labels, transform=finish, devices=machine)

    rows = []
    for epoch in range(-(-flags.steps // 8)):
        layout = sampler.shuffled_epoch(
            training.labels,
            seed=7,
            epoch=epoch,
            batch_size=flags.batch_size,
            replicas=machine.replicas,
            class_weights=sampler.class_weights(training.labels, 3, "balanced"),
        )
        iterator = iter(batches(layout, training, epoch))
        left = min(layout.steps, flags.steps - len(rows))
        while left:
            done = training_loop.train_steps(iterator, min(left, flags.steps_per_loop)).rows
            rows += list(done)
            left -= len(done)
    # As in trainer.job_stages so many to a replica, however many there are: a product of another shape may round otherwise.
    layout = sampler.ordered_epoch(3, batch_size=2 * machine.replicas, replicas=machine.replicas)
    outputs = training_loop.logits(batches(layout, validation, None), layout)
    evaluation = evaluate_logits(outputs, validation.labels, 0.1)
    weights = {f"w{i}": v.numpy() for i, v in enumerate([*network.backbone.variables, *network.head.variables])}
    np.savez(
        flags.output,
        rows=np.array(rows),
        logits=outputs.values,
        validation=np.array([evaluation.loss, evaluation.accuracy]),
        replicas=machine.replicas,
        **weights,
    )


def make_network(name: str, precision: str, *, trains_statistics: bool):
    """A tiny network that batch-normalises, in training if asked to, or ResNet50 itself with its statistics held still."""
    import keras

    from trainer.models import resnet

    if name == "resnet50":
        return resnet.build(
            num_classes=3,
            image_size=32,
            weights="none",
            head="average",
            precision=precision,
            seed=3,
            batch_norm="frozen",
        )
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input([32, 32, 3])
    x = keras.layers.Conv2D(8, 5, strides=3, use_bias=False)(inputs)
    x = keras.layers.BatchNormalization(momentum=0.9, synchronized=True, trainable=trains_statistics)(x)
    x = keras.layers.Conv2D(16, 3, activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D(dtype="float32")(x)
    keras.config.set_dtype_policy("float32")
    return resnet.with_head(keras.Model(inputs, x), 3)


if __name__ == "__main__":
    main()
