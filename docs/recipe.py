"""Compares recipes of the head on cached features, over several splits and seeds, and prints a Markdown table.

    python -m trainer.task --data_dir=cats_and_dogs --weights=W --job_dir=J --cache_dir=features
    python docs/recipe.py cats_and_dogs features/features-*.npz

The cached features are in the order of the image paths, so the features of one job serve every split. Split 0 is the split
by content; the others are random. `--splits=DIR` also writes each split to DIR/N.csv, for trainer.task --split_file.
Shapes: N images, F features, E epochs.
"""

import argparse
import dataclasses
import pathlib
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.benchmarks.suite import one_device
from trainer.data import input_pipeline, sampler, splits
from trainer.data.dataset import Examples, Split, read_folder
from trainer.training.loop import TrainingLoop, evaluate_logits
from trainer.training.optimizer import Recipe, make_optimizer

BATCH_SIZE = 32
VALIDATION_BATCH_SIZE = 600
EPOCHS = 15
DEFAULT = Recipe(optimizer="adam", learning_rate=1e-3, lr_schedule="cosine", dropout=0.2)
CANDIDATES: dict[str, tuple[int, dict[str, Any]]] = {  # name: (epochs, fields that differ from DEFAULT)
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
    """Prints one row per recipe: means over splits and seeds, after the last epoch and at the best epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("features", nargs="+", help="all parts of the cached features")
    parser.add_argument("--num_splits", type=int, default=6)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--splits", type=pathlib.Path, help="folder for the splits as CSV files")
    arguments = parser.parse_args()
    folder = read_folder(arguments.data_dir)
    examples = folder.examples.take(np.argsort(folder.examples.paths))
    features = np.concatenate([np.load(path)["values"] for path in sorted(arguments.features)])
    masks = [validation_mask(examples, number) for number in range(arguments.num_splits)]
    if arguments.splits:
        write_splits(arguments.splits, examples, masks, folder.class_names)
    print("| recipe of the head | last epoch | best epoch | val_loss | seconds per run |")
    print("| --- | --- | --- | --- | --- |")
    for name, (epochs, changes) in CANDIDATES.items():
        recipe = dataclasses.replace(DEFAULT, **changes)
        started = time.monotonic()
        runs = np.array(
            [
                [train_head(features, examples.labels, mask, seed=seed, epochs=epochs, recipe=recipe) for mask in masks]
                for seed in range(arguments.num_seeds)
            ]
        )  # [seeds, splits, E, 2]
        seconds = (time.monotonic() - started) / (arguments.num_seeds * arguments.num_splits)
        print(table_row(name, runs, seconds), flush=True)


def table_row(name: str, runs: np.ndarray, seconds: float) -> str:
    """One row of the table; `runs` float64 [seeds, splits, E, 2] of validation accuracy and loss."""
    last_accuracy, best_accuracy, last_loss = runs[:, :, -1, 0], runs[..., 0].max(axis=2), runs[:, :, -1, 1]
    by_split = last_accuracy.mean(axis=0)
    spread = f"{by_split.min():.4f} to {by_split.max():.4f}"
    means = f"{last_accuracy.mean():.4f} ({spread}) | {best_accuracy.mean():.4f} | {last_loss.mean():.4f}"
    return f"| {name} | {means} | {seconds:.1f} |"


def validation_mask(examples: Examples, number: int) -> np.ndarray:
    """bool [N]: true for the images of the validation split, a fifth of each class."""
    if number == 0:
        return np.isin(examples.paths, splits.split_by_content(examples, 0.2).validation.paths)
    rng = np.random.default_rng(number)
    is_validation = np.zeros(len(examples), bool)
    for label in np.unique(examples.labels):
        members = np.flatnonzero(examples.labels == label)
        is_validation[rng.permutation(members)[: len(members) // 5]] = True
    return is_validation


def write_splits(
    directory: pathlib.Path, examples: Examples, masks: list[np.ndarray], class_names: tuple[str, ...]
) -> None:
    """Writes each split as `directory`/N.csv."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, mask in enumerate(masks):
        with open(directory / f"{number}.csv", "w", newline="") as file:
            splits.write_split(file, Split(examples.take(~mask), examples.take(mask)), class_names)


def train_head(
    features: np.ndarray, labels: np.ndarray, is_validation: np.ndarray, *, seed: int, epochs: int, recipe: Recipe
) -> list[tuple[float, float]]:
    """Trains a head on `features`, float32 [N, F]; returns validation accuracy and loss after each epoch."""
    keras.utils.set_random_seed(seed)
    devices = one_device()
    num_classes = int(labels.max()) + 1
    inputs = keras.Input([features.shape[1]])
    head = keras.Model(inputs, keras.layers.Dense(num_classes)(inputs))
    training_labels, validation_labels = labels[~is_validation], labels[is_validation]
    training, validation = _array_source(features[~is_validation]), _array_source(features[is_validation])
    steps = sampler.steps_per_epoch(len(training_labels), BATCH_SIZE)
    loop = TrainingLoop(
        None,
        head,
        make_optimizer(recipe, epochs=epochs, steps_per_epoch=steps, loss_scaling=False),
        devices=devices,
        batch_size=BATCH_SIZE,
        seed=seed,
        label_smoothing=recipe.label_smoothing,
        dropout=recipe.dropout,
    )
    results = []
    for epoch in range(epochs):
        plan = sampler.shuffled_epoch(
            training_labels,
            seed=seed,
            epoch=epoch,
            batch_size=BATCH_SIZE,
            replicas=1,
            class_weights=np.ones(num_classes, np.float32),
        )
        batches = input_pipeline.batches(plan, training, training_labels, transform=None, devices=devices)
        loop.train_steps(iter(batches), plan.steps)
        plan = sampler.ordered_epoch(len(validation_labels), batch_size=VALIDATION_BATCH_SIZE, replicas=1)
        batches = input_pipeline.batches(plan, validation, validation_labels, transform=None, devices=devices)
        evaluation = evaluate_logits(loop.logits(batches, plan), validation_labels, 0.0)
        results.append((evaluation.accuracy, evaluation.loss))
    return results


def _array_source(values: np.ndarray) -> input_pipeline.ArraySource:
    return input_pipeline.ArraySource(values=tf.constant(values), is_readable=tf.ones(len(values)))


if __name__ == "__main__":
    main()
