"""Compares heads on cached features with logistic regression, on images that were cut off before.

    python -m trainer.task --data_dir=cats_and_dogs --weights=W --job_dir=J --cache_dir=features
    python docs/recipe.py cats_and_dogs features/features-*.npz
        fits heads, and keeps their accuracy in docs/recipe/heads.json

`python docs/generate.py` then writes the table of docs/recipe.md.
Shapes: N images, F features, C classes.
"""

import argparse
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
TITLES = {
    "cats_and_dogs": "cats and dogs",
    "ten_objects": "ten objects",
    "hand_signs": "signs of the hand",
    "tile_defects": "defects of tiles",
    "textures": "textures",
    "groceries": "groceries",
}


def main() -> None:
    """Measures the heads of one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=pathlib.Path)
    parser.add_argument("features", nargs="+", type=pathlib.Path, help="all parts of the cached features of the folder")
    arguments = parser.parse_args()
    path = MEASURED / "heads.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    name = arguments.data_dir.name
    measured = measure_heads(arguments.data_dir, sorted(arguments.features))
    kept = [row for row in rows if row["images"] != name]
    path.write_text(json.dumps([*kept, *({"images": name, **row} for row in measured)], indent=1) + "\n")


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


if __name__ == "__main__":
    main()
