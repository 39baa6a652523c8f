"""Scores of a classifier, with what they leave open: intervals, calibration, comparison of two models.

Shapes: N pictures, K classes.
"""

import statistics
from typing import Any, NamedTuple

import numpy as np


class ClassificationMetrics(NamedTuple):
    """What a confusion matrix tells; ready for JSON but for the matrix."""

    accuracy: float
    balanced_accuracy: float  # mean recall of the classes that have pictures
    per_class: list[dict[str, float | None]]  # [K] of precision, recall, f1, support
    confusion: np.ndarray  # [K true, K predicted] counts


def classification_metrics(labels: Any, predicted: Any, num_classes: int) -> ClassificationMetrics:
    """Scores of N predictions from two integer vectors [N] of class ids.

    Definitions as in scikit-learn's user guide: F1 = 2 TP / (2 TP + FP + FN), balanced accuracy is the mean recall
    (Brodersen et al., 2010). A ratio of nothing (recall without pictures, precision without answers) is None.
    Raises ValueError if there is nothing to score or an id is not in [0, num_classes).
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.size == 0 or labels.shape != predicted.shape:
        raise ValueError(f"labels has shape {labels.shape} and predicted {predicted.shape}: pass two equal [N], N > 0.")
    if min(labels.min(), predicted.min()) < 0 or max(labels.max(), predicted.max()) >= num_classes:
        raise ValueError(f"labels or predicted leave the range of {num_classes} classes: pass ids from 0 on.")
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = cells.reshape(num_classes, num_classes)  # [K true, K predicted]
    right, support, answers = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)  # each [K]
    per_class = [
        {
            "precision": _ratio(right[k], answers[k]),
            "recall": _ratio(right[k], support[k]),
            "f1": _ratio(2 * right[k], answers[k] + support[k]),
            "support": int(support[k]),
        }
        for k in range(num_classes)
    ]
    recalls = [row["recall"] for row in per_class if row["recall"] is not None]
    return ClassificationMetrics(float(right.sum() / labels.size), float(np.mean(recalls)), per_class, confusion)


def top_class(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the most probable class, and its probability, along the last axis of float [..., K]."""
    best = probabilities.argmax(axis=-1)
    return best, np.take_along_axis(probabilities, best[..., None], axis=-1)[..., 0]


def validation_metrics(labels: np.ndarray, probabilities: np.ndarray, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What metrics.json says of labelled images: labels int [N], probabilities float32 [N, K]."""
    metrics = classification_metrics(labels, top_class(probabilities)[0], len(class_names))
    return {
        "val_accuracy": metrics.accuracy,
        "balanced_accuracy": metrics.balanced_accuracy,
        "per_class": dict(zip(class_names, metrics.per_class, strict=True)),
    }


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper bound of a proportion by its score test (Wilson, 1927; Brown, Cai and DasGupta, 2001, eq. 4).

    Holds its level for small `total` and near 0 and 1, where the normal interval does not. ValueError unless total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"correct is {correct} of total {total}: pass 0 <= correct <= total and total > 0.")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5 / (1 + z**2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def reliability_bins(probability: Any, correct: Any, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, share correct and mean probability, each [bins], of the N answers in equal-width bins.

    Bin b holds ((b-1)/bins, b/bins] for b from 1; an empty bin has 0 in all three.
    """
    probability, correct = np.asarray(probability, np.float64), np.asarray(correct, np.float64)  # [N], [N]
    index = np.clip(np.ceil(probability * bins).astype(np.int64) - 1, 0, bins - 1)
    count, right, total = (np.bincount(index, weights=w, minlength=bins) for w in (None, correct, probability))
    return count, right / np.maximum(count, 1), total / np.maximum(count, 1)


def expected_calibration_error(probability: Any, correct: Any, bins: int = 15) -> float:
    """Mean over N answers of |share correct - mean probability| of their bin (Guo et al., 2017, eq. 3; 15 bins).

    probability [N] is that of the predicted class, correct [N] whether it was right. ValueError if N is 0.
    """
    count, accuracy, confidence = reliability_bins(probability, correct, bins)
    if count.sum() == 0:
        raise ValueError("probability is empty: pass one value per picture.")
    return float(np.sum(count * np.abs(accuracy - confidence)) / count.sum())


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


class PairedComparison(NamedTuple):
    """Two models on the same N pictures."""

    only_first: int  # pictures that only the first labelled rightly
    only_second: int
    difference: float  # accuracy of the second less that of the first
    low: float  # of the 95 % interval of the difference
    high: float
    p_value: float  # of McNemar's test: how probable so unequal counts are if both are equally good


def mcnemar_test(first: Any, second: Any) -> PairedComparison:
    """Tests whether two models differ, from bool [N] each: which pictures they labelled rightly.

    McNemar's test in its exact form, two-sided: the pictures that one alone got right are thrown like a fair coin
    (McNemar, 1947). The interval is Bonett and Price's adjusted one (2012), which holds its level for few pictures.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}: pass two equal [N], N > 0.")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    tail, ways = 0, 1
    for k in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (discordant - k) // (k + 1)  # of choosing k + 1 of them, in whole numbers
    p_value = min(1.0, 2 * tail / 2**discordant)
    of_first, of_second = ((count + 1) / (first.size + 2) for count in (only_first, only_second))
    centre = of_second - of_first
    half = statistics.NormalDist().inv_cdf(0.975) * ((of_first + of_second - centre**2) / (first.size + 2)) ** 0.5
    difference = (only_second - only_first) / first.size
    return PairedComparison(
        only_first, only_second, difference, max(-1.0, centre - half), min(1.0, centre + half), p_value
    )


def holm_correction(p_values: list[float]) -> list[float]:
    """P values of several tests, raised so that any false alarm among them is as rare as of one (Holm, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
