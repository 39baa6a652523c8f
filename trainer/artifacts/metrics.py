"""Metrics of a classifier: accuracy, intervals, calibration, comparison of two models.

Shapes: N images, C classes.
"""

import dataclasses
import statistics
from typing import Any

import numpy as np

from trainer import formatting


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationMetrics:
    """The metrics of a confusion matrix. All but the matrix are values that JSON can hold."""

    accuracy: float
    balanced_accuracy: float  # mean recall of the classes that have images
    per_class: list[dict[str, float | None]]  # [C] of precision, recall, f1, support
    confusion: np.ndarray  # [C true, C predicted] counts


def classification_metrics(labels: Any, predicted: Any, num_classes: int) -> ClassificationMetrics:
    """The metrics of N predictions from two integer vectors [N] of class ids.

    Definitions as in scikit-learn's user guide: F1 = 2 TP / (2 TP + FP + FN), balanced accuracy is the mean recall
    (Brodersen et al., 2010). A ratio without a denominator (recall without images, precision without predictions) is
    None. Raises ValueError if N is 0 or an id is not in [0, num_classes).
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.size == 0 or labels.shape != predicted.shape:
        raise ValueError(f"labels has shape {labels.shape} and predicted {predicted.shape}: pass two equal [N], N > 0.")
    if min(labels.min(), predicted.min()) < 0 or max(labels.max(), predicted.max()) >= num_classes:
        raise ValueError(
            f"labels or predicted has an id outside [0, {num_classes}): pass ids of {num_classes} classes."
        )
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = cells.reshape(num_classes, num_classes)  # [C true, C predicted]
    correct, support, predictions = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)  # each [C]
    per_class = [
        {
            "precision": _ratio(correct[c], predictions[c]),
            "recall": _ratio(correct[c], support[c]),
            "f1": _ratio(2 * correct[c], predictions[c] + support[c]),
            "support": int(support[c]),
        }
        for c in range(num_classes)
    ]
    recalls = [row["recall"] for row in per_class if row["recall"] is not None]
    return ClassificationMetrics(
        accuracy=float(correct.sum() / labels.size),
        balanced_accuracy=float(np.mean(recalls)),
        per_class=per_class,
        confusion=confusion,
    )


def _ratio(part: int, total: int) -> float | None:
    return float(part / total) if total else None


def top_class(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the most probable class, and its probability, along the last axis of float [..., C]."""
    best = probabilities.argmax(axis=-1)
    return best, np.take_along_axis(probabilities, best[..., None], axis=-1)[..., 0]


def validation_metrics(labels: np.ndarray, probabilities: np.ndarray, class_names: tuple[str, ...]) -> dict[str, Any]:
    """The values of metrics.json that labeled images give: labels int [N], probabilities float32 [N, C]."""
    metrics = classification_metrics(labels, top_class(probabilities)[0], len(class_names))
    return {
        "val_accuracy": metrics.accuracy,
        "balanced_accuracy": metrics.balanced_accuracy,
        "per_class": dict(zip(class_names, metrics.per_class, strict=True)),
    }


TOP_K = (3, 5)


def probability_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """What the probabilities are worth, as JSON values: labels int [N], probabilities float32 [N, C], N > 0.

    `roc_auc` is the mean over the classes of the area under the ROC curve, one class against the rest (Hand and Till, 2001,
    section 2); None unless there are images of two classes. `top_k_accuracy` has the TOP_K below C.
    """
    from sklearn.metrics import roc_auc_score

    of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    predicted, top = top_class(probabilities)
    rank = (probabilities > of_label[:, None].astype(probabilities.dtype)).sum(
        axis=1
    )  # 0: the label is the most probable
    present = np.unique(labels)
    areas = [roc_auc_score(labels == label, probabilities[:, label]) for label in present] if len(present) > 1 else []
    return {
        "log_loss": float(-np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).mean()),
        "expected_calibration_error": expected_calibration_error(top, predicted == labels),
        "roc_auc": float(np.mean(areas)) if areas else None,
        "top_k_accuracy": {str(k): float((rank < k).mean()) for k in TOP_K if k < probabilities.shape[1]},
    }


def metrics_of_test_set(labels: np.ndarray, probabilities: np.ndarray, class_names: tuple[str, ...]) -> dict[str, Any]:
    """The block `test` of metrics.json: labels int [N], probabilities float32 [N, C], N > 0; a 95 % Wilson interval."""
    metrics = classification_metrics(labels, top_class(probabilities)[0], len(class_names))
    correct = int(metrics.confusion.trace())
    low, high = wilson_interval(correct, len(labels))
    return {
        "accuracy": metrics.accuracy,
        "low": low,
        "high": high,
        "correct": correct,
        "images": len(labels),
        "balanced_accuracy": metrics.balanced_accuracy,
        "per_class": dict(zip(class_names, metrics.per_class, strict=True)),
    }


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper bound of a proportion by its score test (Wilson, 1927; Brown, Cai and DasGupta, 2001, eq. 4).

    Unlike the normal interval, its coverage is correct for small `total` and near 0 and 1. Raises ValueError unless
    total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"correct is {correct} of total {total}: pass 0 <= correct <= total and total > 0.")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half_width = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5 / (1 + z**2 / total)
    return max(0.0, center - half_width), min(1.0, center + half_width)


def describe_accuracy(correct: int, total: int) -> str:
    """An accuracy for people, with its counts and Wilson's 95 % interval: `23 of 24 correct: 96 % (95 %: 80 to 99 %)`."""
    low, high = (
        formatting.share(bound * total, total).removesuffix("\u00a0%") for bound in wilson_interval(correct, total)
    )
    return f"{correct:,} of {total:,} correct: {formatting.share(correct, total)} (95 %: {low} to {high}\u00a0%)"


def estimate(result: ClassificationMetrics) -> dict[str, Any]:
    """Accuracy and balanced accuracy with 95 % intervals, and the counts of images, as JSON values.

    `low` and `high` are Wilson's interval of the accuracy; those of the balanced accuracy combine the intervals of the
    recalls by the method of variance estimates recovery (Zou and Donner, 2008, doi:10.1002/sim.3095).
    """
    correct, support = result.confusion.diagonal(), result.confusion.sum(axis=1)  # [C]
    low, high = wilson_interval(int(correct.sum()), int(support.sum()))
    present = np.flatnonzero(support)
    bounds = np.array([wilson_interval(int(correct[c]), int(support[c])) for c in present]).T  # [2, classes present]
    below, above = (np.linalg.norm(bounds - correct[present] / support[present], axis=1) / len(present)).tolist()
    return {
        "accuracy": result.accuracy,
        "low": low,
        "high": high,
        "correct": int(correct.sum()),
        "images": int(support.sum()),
        "balanced_accuracy": result.balanced_accuracy,
        "balanced_low": result.balanced_accuracy - below,
        "balanced_high": result.balanced_accuracy + above,
    }


def reliability_bins(probability: Any, correct: Any, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of images, share correct and mean probability, each [bins], of N predictions in bins of equal width.

    Bin b holds ((b-1)/bins, b/bins] for b from 1; an empty bin has 0 in all three.
    """
    probability, correct = np.asarray(probability, np.float64), np.asarray(correct, np.float64)  # [N], [N]
    index = np.clip(np.ceil(probability * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    num_correct = np.bincount(index, weights=correct, minlength=bins)
    total_probability = np.bincount(index, weights=probability, minlength=bins)
    return count, num_correct / np.maximum(count, 1), total_probability / np.maximum(count, 1)


def expected_calibration_error(probability: Any, correct: Any, bins: int = 15) -> float:
    """Mean over N predictions of |share correct - mean probability| of their bin (Guo et al., 2017, eq. 3; 15 bins).

    probability [N] is that of the predicted class, correct [N] whether it is the label. Raises ValueError if N is 0.
    """
    count, accuracy, confidence = reliability_bins(probability, correct, bins)
    if count.sum() == 0:
        raise ValueError("probability is empty: pass one value per image.")
    return float(np.sum(count * np.abs(accuracy - confidence)) / count.sum())


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A probability from which on predictions are answers, and what the answers are worth."""

    threshold: float  # of the probability of the predicted class; 0 if all images are answered
    precision: float  # share of the answers that are correct
    answered: int  # images
    share_answered: float


def threshold_for_precision(probability: Any, correct: Any, min_precision: float) -> Threshold | None:
    """The lowest threshold at which the answers among N predictions have at least `min_precision`; None if there is none.

    probability [N] is that of the predicted class, correct [N] whether it is the label. The threshold lies between two
    probabilities, so that it may be rounded a little.
    """
    values, num_correct, count = _cumulative(probability, correct)
    fitting = np.flatnonzero(num_correct >= min_precision * count)
    if not len(fitting):
        return None
    last = fitting[-1]
    is_all = last == len(values) - 1
    return Threshold(
        threshold=0.0 if is_all else float(values[last] + values[last + 1]) / 2,
        precision=float(num_correct[last] / count[last]),
        answered=int(count[last]),
        share_answered=float(count[last] / count[-1]),
    )


def precision_recall_curve(probability: Any, correct: Any, support: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall, float64 [n] each, of the answers among N predictions at each threshold, the highest first.

    `support` is the number of images that a perfect model would answer: for one class, the images of that class.
    """
    _, num_correct, count = _cumulative(probability, correct)
    return num_correct / count, num_correct / support


def _cumulative(probability: Any, correct: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct probabilities, highest first, and the correct predictions and all of at least each of them."""
    probability, correct = np.asarray(probability, np.float64), np.asarray(correct, bool)
    order = np.argsort(-probability, kind="stable")
    values, num_correct = probability[order], correct[order].cumsum()
    ends = np.flatnonzero(np.append(values[1:] != values[:-1], True)[: len(values)])
    return values[ends], num_correct[ends], ends + 1


@dataclasses.dataclass(frozen=True)
class PairedComparison:
    """Two models on the same N images."""

    only_first: int  # images that only the first model classifies correctly
    only_second: int
    difference: float  # accuracy of the second minus that of the first
    low: float  # of the 95 % interval of the difference
    high: float
    p_value: float  # of McNemar's test: probability of counts at least this unequal if the models are equally good


def mcnemar_test(first: Any, second: Any) -> PairedComparison:
    """Tests whether two models differ, from bool [N] each: which images they classify correctly.

    McNemar's exact test, two-sided: if both models are equally good, each image that only one of them classifies
    correctly belongs to either with probability 1/2 (McNemar, 1947). The interval is the adjusted one of Bonett and
    Price (2012), whose coverage is correct for few images. Raises ValueError if the shapes differ or N is 0.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}: pass two equal [N], N > 0.")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    tail, combinations = 0, 1  # integers, which do not overflow
    for k in range(min(only_first, only_second) + 1):
        tail += combinations
        combinations = combinations * (discordant - k) // (k + 1)  # of k + 1 out of the discordant images
    share_first, share_second = ((count + 1) / (first.size + 2) for count in (only_first, only_second))
    center = share_second - share_first
    half_width = (
        statistics.NormalDist().inv_cdf(0.975) * ((share_first + share_second - center**2) / (first.size + 2)) ** 0.5
    )
    return PairedComparison(
        only_first=only_first,
        only_second=only_second,
        difference=(only_second - only_first) / first.size,
        low=max(-1.0, center - half_width),
        high=min(1.0, center + half_width),
        p_value=min(1.0, 2 * tail / 2**discordant),
    )


def holm_correction(p_values: list[float]) -> list[float]:
    """P values of several tests, adjusted so that the familywise error rate is that of one test (Holm, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
