"""Tries recipes of the head over features that a job has left, on several splits and seeds, and prints a table.

    python -m trainer.task --data_dir=cats_and_dogs --weights=W --job_dir=J --cache_dir=features
    python docs/recipe.py cats_and_dogs features/features-*.npz

Features lie in the order of the paths, so that those of one job serve every split. Split 0 is the one by content, the
others are drawn. With `--splits=DIR` it also writes each split as DIR/N.csv, for trainer.task --split_file.
"""

import argparse
import pathlib
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import contenders, data, examples, train
from trainer.examples import Examples, Split

BATCH_SIZE = 32
DEFAULT = train.Recipe("adam", 1e-3, "cosine", 0.0, 0.0, 0.0, 0.0, 0.2)
EPOCHS = 15
TRIED: dict[str, tuple[int, dict[str, Any]]] = {
    "default": (EPOCHS, {}),
    "5 epochs": (5, {}),
    "30 epochs": (30, {}),
    "learning rate 3e-4": (EPOCHS, {"learning_rate": 3e-4}),
    "learning rate 3e-3": (EPOCHS, {"learning_rate": 3e-3}),
    "constant learning rate": (EPOCHS, {"lr_schedule": "constant"}),
    "1 epoch of warm-up": (EPOCHS, {"warmup_epochs": 1.0}),
    "no dropout": (EPOCHS, {"dropout": 0.0}),
    "dropout 0.5": (EPOCHS, {"dropout": 0.5}),
    "label smoothing 0.1": (EPOCHS, {"label_smoothing": 0.1}),
    "adamw": (EPOCHS, {"optimizer": "adamw"}),
    "sgd 1e-3": (EPOCHS, {"optimizer": "sgd", "learning_rate": 1e-3}),
    "sgd 3e-3": (EPOCHS, {"optimizer": "sgd", "learning_rate": 3e-3}),
    "sgd 1e-2": (EPOCHS, {"optimizer": "sgd", "learning_rate": 1e-2}),
    "sgd 3e-2": (EPOCHS, {"optimizer": "sgd", "learning_rate": 3e-2}),
}


def main() -> None:
    """Prints one line for each recipe: means over splits and seeds of the last and the best epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("features")
    parser.add_argument("--num_splits", type=int, default=6)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--splits", type=pathlib.Path)
    flags = parser.parse_args()
    folder = examples.read_folder(flags.data_dir)
    everything = folder.examples.take(np.argsort(folder.examples.paths))
    features = np.load(flags.features)["values"]
    sides = [split(everything, number) for number in range(flags.num_splits)]
    if flags.splits:
        flags.splits.mkdir(parents=True, exist_ok=True)
        for number, is_held_out in enumerate(sides):
            with open(flags.splits / f"{number}.csv", "w", newline="") as file:
                both = Split(everything.take(~is_held_out), everything.take(is_held_out))
                examples.write_split(file, both, folder.class_names)
    print(
        "| recipe of the head | last epoch | best epoch | val_loss | seconds a run |\n| --- | --- | --- | --- | --- |"
    )
    for name, (epochs, changes) in TRIED.items():
        started = time.monotonic()
        runs = np.array(
            [
                [run(features, everything.labels, side, seed, epochs, DEFAULT._replace(**changes)) for side in sides]
                for seed in range(flags.num_seeds)
            ]
        )  # [seeds, splits, epochs, 2]
        seconds = (time.monotonic() - started) / (flags.num_seeds * flags.num_splits)
        last, best, loss = runs[:, :, -1, 0], runs[..., 0].max(axis=2), runs[:, :, -1, 1]
        spread = f"{last.mean(axis=0).min():.4f} to {last.mean(axis=0).max():.4f}"
        print(
            f"| {name} | {last.mean():.4f} ({spread}) | {best.mean():.4f} | {loss.mean():.4f} | {seconds:.1f} |",
            flush=True,
        )


def split(pictures: Examples, number: int) -> np.ndarray:
    """bool [N]: who is held out, a fifth of each class."""
    if number == 0:
        return np.isin(pictures.paths, examples.split(pictures, 0.2).validation.paths)
    rng, is_held_out = np.random.default_rng(number), np.zeros(len(pictures), bool)
    for label in np.unique(pictures.labels):
        members = np.flatnonzero(pictures.labels == label)
        is_held_out[rng.permutation(members)[: len(members) // 5]] = True
    return is_held_out


def run(
    features: np.ndarray, labels: np.ndarray, is_held_out: np.ndarray, seed: int, epochs: int, recipe: train.Recipe
) -> list[tuple[float, float]]:
    """Validation accuracy and loss after each epoch of a head over `features`, float32 [N, F]."""
    keras.utils.set_random_seed(seed)
    inputs, devices = keras.Input([features.shape[1]]), contenders.one_device()
    num_classes = int(labels.max()) + 1
    head = keras.Model(inputs, keras.layers.Dense(num_classes)(inputs))
    sides = [(features[mask], labels[mask]) for mask in (~is_held_out, is_held_out)]
    tables = [data.Table(tf.constant(rows), tf.ones(len(rows))) for rows, _ in sides]
    steps = -(-len(sides[0][1]) // BATCH_SIZE)
    optimizer = train.make_optimizer(recipe, epochs=epochs, steps_per_epoch=steps, loss_scaling=False)
    options: dict[str, Any] = {"label_smoothing": recipe.label_smoothing, "dropout": recipe.dropout}
    loop = train.Loop(None, head, optimizer, devices=devices, batch_size=BATCH_SIZE, seed=seed, **options)
    results = []
    for epoch in range(epochs):
        layout = data.training_epoch(
            sides[0][1],
            seed=seed,
            epoch=epoch,
            batch_size=BATCH_SIZE,
            replicas=1,
            class_weights=np.ones(num_classes, np.float32),
        )
        batches = data.batches(layout, tables[0], sides[0][1], finish=None, devices=devices)
        loop.train_steps(iter(batches), layout.steps, False)
        layout = data.ordered_epoch(len(sides[1][1]), batch_size=600, replicas=1)
        outputs = loop.logits(data.batches(layout, tables[1], sides[1][1], finish=None, devices=devices), layout)
        judged = train.validate(outputs, sides[1][1], 0.0)
        results.append((judged.accuracy, judged.loss))
    return results


if __name__ == "__main__":
    main()
