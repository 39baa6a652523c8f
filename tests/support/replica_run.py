"""Trains small networks on an image folder for some steps and writes every number to files. Not a test itself.

    python replica_run.py FOLDER DEVICES OUTPUT_0.npz "--precision=float32 --optimizer=sgd" OUTPUT_1.npz "--steps=0" ...

Runs one after another in one process, or as one of several workers according to TF_CONFIG. Tests compare the files.
"""

import argparse
import os
import sys

from trainer import cli
from trainer.data import sampler
from trainer.data.dataset import Examples, read_folder
from trainer.runtime import cluster
from trainer.training.inference import evaluate_logits
from trainer.training.loop import TrainingLoop
from trainer.training.optimizer import Recipe, make_optimizer

SEED = 7
VALIDATION_INDICES = (0, 30, 60)  # 3 images to validate and 61 to train: neither is a multiple of the batch size


def main() -> None:
    """Starts TensorFlow as trainer.task does, then trains with each set of flags."""
    folder, num_devices, *runs = sys.argv[1:]
    worker = cluster.resolve(os.environ)
    os.environ |= cluster.tensorflow_environment(worker)
    cli.import_tensorflow()
    import tensorflow as tf

    from trainer.runtime import devices

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(num_devices))
    machine = devices.start(worker, require_gpu=False)
    for output, flags in zip(runs[::2], runs[1::2], strict=True):
        run(folder, output, parse_flags(flags), machine)


def parse_flags(text: str) -> argparse.Namespace:
    """The flags of one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--network", default="tiny", help="tiny, or a name of --backbone")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--steps_per_loop", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--frozen", type=int, default=0, help="1: the batch-norm statistics are not trained")
    parser.add_argument("--xla", type=int, default=0)
    return parser.parse_args(text.split())


def run(folder: str, output: str, flags: argparse.Namespace, machine) -> None:
    """Trains, validates and writes the output file."""
    import numpy as np

    from trainer.data import input_pipeline
    from trainer.data.preprocessing import Augmentation, NetworkInput
    from trainer.models import networks

    with machine.strategy.scope():
        network = make_network(flags.network, flags.precision, trains_statistics=not flags.frozen)
        recipe = Recipe(
            optimizer=flags.optimizer,
            learning_rate=0.01,
            lr_schedule="cosine",
            warmup_epochs=1.0,
            weight_decay=1e-3,
            clip_norm=1.0,
            label_smoothing=0.1,
            dropout=0.3,
        )
        optimizer = make_optimizer(recipe, epochs=4, steps_per_epoch=8, loss_scaling=flags.precision == "mixed_float16")
        if flags.precision == "mixed_float16":
            # The default of Keras, 2**15, makes the first gradients overflow, and such a step is skipped. The gradient of
            # half a batch overflows sooner than that of the whole batch, so runs would skip different steps.
            optimizer.initial_scale = 2.0**10
    loop = TrainingLoop(
        network.backbone,
        network.head,
        optimizer,
        devices=machine,
        batch_size=flags.batch_size,
        seed=SEED,
        label_smoothing=recipe.label_smoothing,
        dropout=recipe.dropout,
        jit_compile=bool(flags.xla),
    )
    images = read_folder(folder).examples
    is_validation = np.isin(np.arange(len(images)), VALIDATION_INDICES)
    training, validation = images.take(~is_validation), images.take(is_validation)
    assert (len(training), len(validation)) == (61, 3)

    network_input = NetworkInput(image_size=32, resize="stretch", preprocessing="rescale")
    sources = {  # created once: each builds a graph
        side: input_pipeline.FileSource(folder, side.paths, network_input, on_unreadable=print, is_jpeg=True)
        for side in (training, validation)
    }

    def make_batches(plan: sampler.EpochPlan, examples: Examples, epoch: int | None):
        augmentation = None if epoch is None else Augmentation(SEED, epoch, strength="basic", flips=True)
        transform = input_pipeline.BatchTransform("rescale", augmentation, networks.input_dtype(network.backbone))
        return input_pipeline.batches(plan, sources[examples], examples.labels, transform=transform, devices=machine)

    rows = []
    for epoch in range(sampler.steps_per_epoch(flags.steps, 8)):
        plan = sampler.shuffled_epoch(
            training.labels,
            seed=SEED,
            epoch=epoch,
            batch_size=flags.batch_size,
            replicas=machine.replicas,
            class_weights=sampler.class_weights(training.labels, 3, "balanced"),
        )
        iterator = iter(make_batches(plan, training, epoch))
        steps_left = min(plan.steps, flags.steps - len(rows))
        while steps_left:
            results = loop.train_steps(iterator, min(steps_left, flags.steps_per_loop))
            rows += list(results.rows)
            steps_left -= len(results.rows)
    # The same batch size per replica on any number of replicas, as in training.stages: another shape may round otherwise.
    plan = sampler.ordered_epoch(3, batch_size=2 * machine.replicas, replicas=machine.replicas)
    outputs = loop.logits(make_batches(plan, validation, None), plan)
    result = evaluate_logits(outputs, validation.labels, 0.1)
    variables = [*network.backbone.variables, *network.head.variables]
    np.savez(
        output,
        rows=np.array(rows),
        logits=outputs.values,
        validation=np.array([result.loss, result.accuracy]),
        replicas=machine.replicas,
        **{f"w{i}": variable.numpy() for i, variable in enumerate(variables)},
    )


def make_network(name: str, precision: str, *, trains_statistics: bool):
    """A small network with batch normalization, or a backbone with frozen statistics."""
    import keras

    from trainer.models import networks

    if name != "tiny":
        return networks.build(
            num_classes=3,
            image_size=32,
            backbone=name,
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
    return networks.with_head(keras.Model(inputs, x), 3)


if __name__ == "__main__":
    main()
