"""Metrics equal hand-computed and published values."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
import sklearn.metrics

from trainer.artifacts import metrics
from trainer.artifacts.metrics import (
    classification_metrics,
    estimate,
    expected_calibration_error,
    holm_correction,
    mcnemar_test,
    top_class,
    wilson_interval,
)


def test_classification_metrics_equal_hand_computed_values():
    metrics = classification_metrics([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], num_classes=2)
    assert metrics.confusion.tolist() == [[3, 1], [1, 1]]
    assert metrics.accuracy == pytest.approx(4 / 6)
    assert metrics.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert metrics.per_class[0] == pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "support": 4})
    assert metrics.per_class[1] == pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2})


def test_a_class_without_images_has_no_recall():
    metrics = classification_metrics([0, 0, 1], [0, 2, 1], num_classes=4)
    assert metrics.balanced_accuracy == pytest.approx((1 / 2 + 1) / 2)
    assert metrics.per_class[2] == {"precision": 0.0, "recall": None, "f1": 0.0, "support": 0}
    assert metrics.per_class[3] == {"precision": None, "recall": None, "f1": None, "support": 0}
    json.dumps(metrics.per_class, allow_nan=False)


def test_the_interval_of_the_balanced_accuracy_is_wide_where_a_class_is_rare():
    labels = np.repeat([0, 1], [990, 10])
    result = estimate(classification_metrics(labels, np.where(np.arange(1000) < 995, 0, 1), num_classes=3))
    assert (result["correct"], result["images"], result["accuracy"]) == (995, 1000, 0.995)
    assert (result["low"], result["high"]) == wilson_interval(995, 1000)
    assert result["balanced_accuracy"] == 0.75
    # The recall of the other class is 1 of 1,000 images, so half of the interval of 5 of 10 remains.
    low, high = wilson_interval(5, 10)
    assert result["balanced_low"] == pytest.approx(0.75 - (0.5 - low) / 2, abs=1e-3)
    assert result["balanced_high"] == pytest.approx(0.75 + (high - 0.5) / 2, abs=1e-3)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("labels", "predicted"), [([], []), ([0, 1], [0]), ([0], [2]), ([-1], [0])])
def test_ids_outside_the_classes_raise(labels, predicted):
    with pytest.raises(ValueError, match="labels"):
        classification_metrics(labels, predicted, num_classes=2)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_values(correct, total, low, high):
    """Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998), table I."""
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_of_a_total_of_0_raises():
    with pytest.raises(ValueError, match="total 0"):
        wilson_interval(0, 0)


def test_calibration_error_is_small_for_a_calibrated_model():
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.2, 1, 200_000)
    assert expected_calibration_error(probability, rng.uniform(size=200_000) < probability) < 0.005


def test_calibration_error_equals_the_hand_computed_value():
    probability, correct = [0.95, 0.95, 0.95, 0.95, 0.6, 0.6], [1, 1, 0, 0, 1, 0]
    # Bins of 0.1: four predictions at 0.95, half of them correct; two at 0.6, half of them correct.
    assert expected_calibration_error(probability, correct, bins=10) == pytest.approx(4 / 6 * 0.45 + 2 / 6 * 0.1)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0


def test_comparison_of_two_models_equals_hand_computed_values():
    # 21 images: one that only the first model classifies correctly, seven that only the second does.
    first = np.array([1] * 1 + [0] * 7 + [1] * 1 + [0] * 12)
    second = np.array([0] * 1 + [1] * 7 + [1] * 1 + [0] * 12)
    pair = mcnemar_test(first, second)
    assert (pair.only_first, pair.only_second) == (1, 7)
    assert pair.p_value == pytest.approx(2 * (1 + 8) / 2**8)
    assert pair.difference == pytest.approx(6 / 21)
    center, half_width = 6 / 23, 1.959964 * ((10 / 23 - (6 / 23) ** 2) / 23) ** 0.5
    assert (pair.low, pair.high) == pytest.approx((center - half_width, center + half_width), abs=1e-6)
    assert mcnemar_test(second, first).difference == -pair.difference


def test_equal_predictions_have_no_significant_difference():
    pair = mcnemar_test([True, False] * 50, [True, False] * 50)
    assert (pair.difference, pair.p_value) == (0, 1)
    assert pair.low == -pair.high


def test_coverage_and_false_alarm_rate_match_their_levels():
    rng = np.random.default_rng(0)
    covered = false_alarms = 0
    for _ in range(2000):
        draws = rng.uniform(size=80)
        different = mcnemar_test(draws < 0.80, (draws > 0.10) & (draws < 0.95))  # the second is better by 0.05
        covered += different.low <= 0.05 <= different.high
        equal = mcnemar_test(draws < 0.85, (draws > 0.10) & (draws < 0.95))
        false_alarms += equal.p_value < 0.05
    assert covered / 2000 > 0.94
    assert false_alarms / 2000 < 0.05


def test_the_exact_test_works_for_many_discordant_images():
    pair = mcnemar_test(np.arange(20_000) < 10_100, np.arange(20_000) >= 10_100)
    # The normal approximation with continuity correction: z = (|b - c| - 1) / sqrt(b + c).
    assert pair.p_value == pytest.approx(2 * (1 - statistics.NormalDist().cdf(199 / 20_000**0.5)), rel=1e-3)


def test_holm_correction_equals_hand_computed_values():
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_correction([0.9]) == [0.9]


def test_top_class_is_the_argmax_and_its_probability():
    index, probability = top_class(np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]], np.float32))
    assert index.tolist() == [1, 0]
    assert probability == pytest.approx([0.5, 0.9])


def test_the_threshold_is_the_lowest_with_the_precision():
    probability, correct = [0.9, 0.8, 0.7, 0.7, 0.6, 0.4], [1, 1, 0, 1, 1, 0]
    found = metrics.threshold_for_precision(probability, correct, 0.8)  # 4 of 5 from 0.6 on, 3 of 4 from 0.7 on
    assert dataclasses.asdict(found) == pytest.approx(
        {"threshold": 0.5, "precision": 0.8, "answered": 5, "share_answered": 5 / 6}
    )
    assert metrics.threshold_for_precision(probability, correct, 1.0).threshold == pytest.approx(0.75)
    assert metrics.threshold_for_precision(probability, correct, 0.5).threshold == 0
    assert metrics.threshold_for_precision([0.9, 0.8], [0, 1], 0.9) is None
    assert metrics.threshold_for_precision([], [], 0.9) is None


def test_the_curve_has_one_point_for_each_probability():
    precision, recall = metrics.precision_recall_curve([0.5, 0.9, 0.5], [1, 1, 0], support=4)
    assert precision.tolist() == [1, pytest.approx(2 / 3)]
    assert recall.tolist() == [0.25, 0.5]


def test_an_accuracy_is_written_with_counts_interval_and_as_many_decimals_as_the_count_carries():
    assert metrics.describe_accuracy(24, 24).replace("\u00a0", " ") == "24 of 24 correct: 100 % (95 %: 86 to 100 %)"
    assert (
        metrics.describe_accuracy(580, 600).replace("\u00a0", " ")
        == "580 of 600 correct: 96.7 % (95 %: 94.9 to 97.8 %)"
    )
    assert metrics.describe_accuracy(2300, 2400).startswith("2,300 of 2,400 correct: 95.83\u00a0%")


def test_the_probability_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 6, 200), rng.dirichlet(np.ones(6), 200).astype(np.float32)
    found = metrics.probability_metrics(labels, probabilities)
    assert found["log_loss"] == pytest.approx(sklearn.metrics.log_loss(labels, probabilities), rel=1e-4)
    assert metrics.probability_metrics(labels[:1], probabilities[:1])["roc_auc"] is None
    areas = [sklearn.metrics.roc_auc_score(labels == label, probabilities[:, label]) for label in range(6)]
    assert found["roc_auc"] == pytest.approx(np.mean(areas))
    for k in (3, 5):
        assert found["top_k_accuracy"][str(k)] == pytest.approx(
            sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=k)
        )
