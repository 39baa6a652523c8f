"""The measurements of docs/recipe.md: heads on cached features, and whole recipes, on images that were cut off before.

    python -m trainer.task --data_dir=cats_and_dogs --weights=W --job_dir=J --cache_dir=features
    python docs/recipe.py heads cats_and_dogs features/features-*.npz
        fits heads, and keeps their accuracy in docs/recipe/heads.json

    python -m trainer.benchmark --suite=accuracy --recipe_dirs=cats_and_dogs --weights=W --output_dir=results
    python docs/recipe.py recipes results
        keeps what trainer.benchmark measured in docs/recipe/recipes.json, and draws docs/recipe/recipes.png

`python docs/generate.py` then writes the tables of docs/recipe.md.
Shapes: N images, F features, C classes.
"""

import argparse
import csv
import json
import pathlib
import time
from typing import Any

import numpy as np
import threadpoolctl

from trainer.artifacts.metrics import expected_calibration_error, top_class
from trainer.data.dataset import read_folder
from trainer.training import head_solver

DOCS = pathlib.Path(__file__).parent
MEASURED = DOCS / "recipe"
SIZES = ("20", "50", "200", "all")  # images per class
SEEDS = 3
NUM_DRAWS = 200
TEST_FRACTION = VALIDATION_FRACTION = 0.2
COMPARED_RECIPES = (
    "trainer --recipe=head",
    "trainer --recipe=finetune",
    "logistic regression on the same features",
)
TITLES = {
    "cats_and_dogs": "cats and dogs",
    "ten_objects": "ten objects",
    "hand_signs": "signs of the hand",
    "tile_defects": "defects of tiles",
    "textures": "textures",
    "groceries": "groceries",
}


def main() -> None:
    """Measures the heads of one folder, or takes over what trainer.benchmark measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    heads = commands.add_parser("heads")
    heads.add_argument("data_dir", type=pathlib.Path)
    heads.add_argument("features", nargs="+", type=pathlib.Path, help="all parts of the cached features of the folder")
    recipes = commands.add_parser("recipes")
    recipes.add_argument("results", type=pathlib.Path, help="--output_dir of trainer.benchmark")
    arguments = parser.parse_args()
    if arguments.command == "heads":
        keep_heads(arguments.data_dir, sorted(arguments.features))
    else:
        (MEASURED / "recipes.json").write_text((arguments.results / "benchmark.json").read_text())
        draw_epochs(arguments.results / "histories").savefig(MEASURED / "recipes.png", dpi=100)


def keep_heads(data_dir: pathlib.Path, features: list[pathlib.Path]) -> None:
    """Measures the heads of one folder; those of others are kept."""
    path = MEASURED / "heads.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    measured = measure_heads(data_dir, features)
    kept = [row for row in rows if row["images"] != data_dir.name]
    path.write_text(json.dumps([*kept, *({"images": data_dir.name, **row} for row in measured)], indent=1) + "\n")


def measure_heads(data_dir: pathlib.Path, features: list[pathlib.Path]) -> list[dict[str, Any]]:
    """One row per number of images per class: accuracy and calibration error on test images, over all seeds together.

    For each seed a fifth of each class is the test part, which nothing sees. A fifth of the others is the validation part
    of a job, which its head does not see; logistic regression is fitted without it and, for comparison, with it.
    """
    folder = read_folder(str(data_dir))
    labels = folder.examples.labels[np.argsort(folder.examples.paths)]  # cached features are in this order
    values = np.concatenate([np.load(path)["values"] for path in features])
    rows: list[dict[str, Any]] = []
    num_training = 0
    for size in SIZES:
        parts = [draw_parts(labels, None if size == "all" else int(size), seed) for seed in range(SEEDS)]
        if len(parts[0][0]) == num_training:
            rows[-1]["size"] = size  # no class has more images than the size before
            continue
        num_training = len(parts[0][0])
        row = {"size": size, "training": num_training, "test": len(parts[0][2])}
        started = time.process_time()
        row["head"] = score([head_probabilities(values, labels, part, seed) for seed, part in enumerate(parts)])
        row["head_cpu_seconds"] = (time.process_time() - started) / SEEDS
        row["logistic_regression"] = score([baseline_probabilities(values, labels, part) for part in parts])
        with_validation = [(np.concatenate([training, held_out]), held_out, test) for training, held_out, test in parts]
        row["with_validation"] = score([baseline_probabilities(values, labels, part) for part in with_validation])
        print(data_dir.name, row, flush=True)
        rows.append(row)
    return rows


def draw_parts(labels: np.ndarray, size: int | None, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the training, validation and test images, with up to `size` images per class to train and validate."""
    rng = np.random.default_rng(seed)
    parts: tuple[list, list, list] = ([], [], [])
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_test = max(1, round(TEST_FRACTION * len(members)))
        rest = members[num_test:][:size]
        num_validation = max(1, round(VALIDATION_FRACTION * len(rest)))
        for part, chosen in zip(parts, (rest[num_validation:], rest[:num_validation], members[:num_test]), strict=True):
            part.extend(chosen)
    return np.array(parts[0]), np.array(parts[1]), np.array(parts[2])


def head_probabilities(values: np.ndarray, labels: np.ndarray, part: tuple, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float [n, C] and labels of the test part, by the head that a job fits."""
    training, _, test = part
    num_classes = int(labels.max()) + 1
    head = head_solver.fit(values[training], labels[training], num_classes=num_classes, is_balanced=False, seed=seed)
    logits = values[test] @ head.kernel + head.bias
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True), labels[test]


def baseline_probabilities(values: np.ndarray, labels: np.ndarray, part: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The same by LogisticRegressionCV on standardized features, C by accuracy. PCA only rotates them, which saves time."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    training, _, test = part
    folds = min(5, np.bincount(labels[training]).min())
    search = LogisticRegressionCV(
        Cs=8, cv=folds, scoring="accuracy", l1_ratios=(0,), max_iter=1000, use_legacy_attributes=False
    )
    with threadpoolctl.threadpool_limits(1):
        model = make_pipeline(StandardScaler(), PCA(), search).fit(values[training], labels[training])
        return model.predict_proba(values[test]), labels[test]


def score(results: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Accuracy and expected calibration error (ECE) over the test parts of all seeds.

    `chance_error` is the mean ECE of a classifier with the same confidences, all of them true: with few images it is not 0.
    """
    probabilities, labels = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
    predicted, confidence = top_class(probabilities)
    is_correct = predicted == labels
    draws = np.random.default_rng(0).random((NUM_DRAWS, len(labels))) < confidence
    return {
        "accuracy": float(is_correct.mean()),
        "calibration_error": expected_calibration_error(confidence, is_correct),
        "chance_error": float(np.mean([expected_calibration_error(confidence, draw) for draw in draws])),
    }


def heads_table() -> str:
    """docs/recipe/heads.json as a Markdown table."""
    lines = [
        "| images | per class | training images | head of a job | ECE (by chance) | logistic regression | ECE | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in json.loads((MEASURED / "heads.json").read_text()):
        head, baseline = row["head"], row["logistic_regression"]
        lines.append(
            f"| {TITLES[row['images']]} | {row['size']} | {row['training']} | {head['accuracy']:.3f} "
            f"| {100 * head['calibration_error']:.1f} ({100 * head['chance_error']:.1f}) | {baseline['accuracy']:.3f} "
            f"| {100 * baseline['calibration_error']:.1f} | {row['head_cpu_seconds']:.1f} |"
        )
    return "\n".join(lines)


def recipes_table() -> str:
    """The suites `accuracy` of docs/recipe/recipes.json as a Markdown table: means over the rounds."""
    lines = [
        "| images | per class | head | fine-tuned | difference, each round | logistic regression | ECE of the three "
        "| seconds of the three |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for suite in json.loads((MEASURED / "recipes.json").read_text())["suites"]:
        name, size, _ = suite["title"].split(", ")
        compared = [suite["figures"][label] for label in COMPARED_RECIPES]
        accuracy = [np.array(recipe["test_accuracy"]) for recipe in compared]
        errors = [100 * np.mean(recipe["test_calibration_error"]) for recipe in compared]
        seconds = [np.mean(recipe["seconds"]) for recipe in compared]
        means = [f"{values.mean():.3f}" for values in accuracy]
        gains = 100 * (accuracy[1] - accuracy[0])
        lines.append(
            f"| {TITLES[name]} | {size.removesuffix(' images per class')} | {means[0]} | {means[1]} "
            f"| **{gains.mean():+.1f}** ({', '.join(f'{gain:+.1f}' for gain in gains)}) | {means[2]} "
            f"| {', '.join(f'{error:.1f}' for error in errors)} | {', '.join(f'{second:.0f}' for second in seconds)} |"
        )
    return "\n".join(lines)


def draw_epochs(histories: pathlib.Path) -> Any:
    """A figure of the validation accuracy of fine-tuning, epoch by epoch, for each folder; the first epoch is the head."""
    import matplotlib.figure
    from matplotlib import ticker

    folders = sorted(path for path in histories.iterdir() if any(path.glob("finetune-*.csv")))
    figure = matplotlib.figure.Figure(figsize=(10, 2.6 * -(-len(folders) // 3)), layout="constrained")
    for number, folder in enumerate(folders):
        axes = figure.add_subplot(-(-len(folders) // 3), 3, number + 1)
        name, size, _ = folder.name.split(", ")
        for path in sorted(folder.glob("finetune-*.csv")):
            with open(path, newline="") as file:
                accuracy = [100 * float(row["val_accuracy"]) for row in csv.DictReader(file)]
            axes.plot(range(len(accuracy)), accuracy, marker=".", linewidth=1)
            axes.axhline(accuracy[0], linewidth=0.5, color="gray", linestyle="--")
        axes.set_title(f"{TITLES[name]}, {size}", fontsize=9)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch of the whole network (0: head)", fontsize=8)
        axes.set_ylabel("validation accuracy, %", fontsize=8)
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
