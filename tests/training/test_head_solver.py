"""The head that is fitted to its optimum: what it equals, what it is good for, and the folders that are hard."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from trainer.artifacts.metrics import expected_calibration_error
from trainer.training import head_solver

NUM_FEATURES = 40


def make_data(
    num_examples: int, *, num_classes: int, seed: int, separation: float = 0.35
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, F] with the mean, the scale and the overlap of real ones, and labels [N] of every class."""
    centers = np.random.default_rng(99).normal(size=(num_classes, NUM_FEATURES)) * separation
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_examples) % num_classes)
    features = 3 + 0.2 * (centers[labels] + rng.normal(size=(num_examples, NUM_FEATURES)))
    return features.astype(np.float32), labels


def fit(features, labels, *, num_classes: int, is_balanced: bool = False) -> head_solver.HeadFit:
    return head_solver.fit(features, labels, num_classes=num_classes, is_balanced=is_balanced, seed=0)


def probabilities_of(solution: head_solver.HeadFit, features: np.ndarray) -> np.ndarray:
    logits = features @ solution.kernel + solution.bias
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("num_examples", [15, 600])  # with fewer examples than features, the features are rotated
def test_the_fit_is_logistic_regression_on_normalized_features(num_classes, num_examples):
    features, labels = make_data(num_examples, num_classes=num_classes, seed=0)
    solution = fit(features, labels, num_classes=num_classes)
    normalized = (features - features.mean(axis=0)) / features.std(axis=0).mean()
    model = LogisticRegression(C=solution.inverse_regularization, tol=1e-8, max_iter=10_000).fit(normalized, labels)
    np.testing.assert_allclose(probabilities_of(solution, features), model.predict_proba(normalized), atol=1e-3)


@pytest.mark.parametrize("num_classes", [2, 6])
def test_held_out_probabilities_are_honest_and_no_other_c_is_much_better(num_classes):
    features, labels = make_data(60 * num_classes, num_classes=num_classes, seed=1)
    held_out, held_out_labels = make_data(6000, num_classes=num_classes, seed=2)
    solution = fit(features, labels, num_classes=num_classes)
    probabilities = probabilities_of(solution, held_out)
    is_correct = probabilities.argmax(axis=1) == held_out_labels
    assert expected_calibration_error(probabilities.max(axis=1), is_correct) < 0.05
    mean, scale = features.mean(axis=0), features.std(axis=0).mean()
    for candidate in head_solver.CANDIDATES:
        model = LogisticRegression(C=candidate, max_iter=1000).fit((features - mean) / scale, labels)
        assert is_correct.mean() > model.score((held_out - mean) / scale, held_out_labels) - 0.03
    assert abs(solution.cross_validated_accuracy - is_correct.mean()) < 0.06


def test_the_same_data_give_the_same_bits():
    features, labels = make_data(90, num_classes=3, seed=3)
    one, other = (fit(features, labels, num_classes=3) for _ in range(2))
    np.testing.assert_array_equal(one.kernel, other.kernel)
    np.testing.assert_array_equal(one.bias, other.bias)


def test_balanced_classes_count_equally():
    features, labels = make_data(1200, num_classes=2, seed=4, separation=0.12)
    is_kept = (labels == 0) | (np.arange(len(labels)) < 60)  # one of twenty examples is of class 1
    held_out, held_out_labels = make_data(4000, num_classes=2, seed=5, separation=0.12)

    def recalls(is_balanced: bool) -> list[float]:
        solution = fit(features[is_kept], labels[is_kept], num_classes=2, is_balanced=is_balanced)
        predicted = probabilities_of(solution, held_out).argmax(axis=1)
        return [float((predicted == label)[held_out_labels == label].mean()) for label in (0, 1)]

    assert min(recalls(is_balanced=True)) > min(recalls(is_balanced=False)) + 0.2


@pytest.mark.parametrize("is_balanced", [False, True])
@pytest.mark.parametrize("counts", [(1, 1), (1, 1, 1), (1, 8), (1, 1, 9, 7), (2, 2), (2, 30)])
def test_classes_with_one_or_two_images_are_fitted(counts, is_balanced):
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.eye(len(counts), NUM_FEATURES, dtype=np.float32)[labels]
    features += 0.05 * np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
    solution = fit(features, labels, num_classes=len(counts), is_balanced=is_balanced)
    assert solution.kernel.shape == (NUM_FEATURES, len(counts))
    assert np.isfinite(solution.kernel).all()
    assert (solution.cross_validated_accuracy is None) == (sum(count > 1 for count in counts) < 2)


def test_equal_features_give_the_frequencies_of_the_classes():
    features, labels = np.ones((40, NUM_FEATURES), np.float32), np.repeat([0, 1], [30, 10])
    probabilities = probabilities_of(fit(features, labels, num_classes=2), features[:1])
    np.testing.assert_allclose(probabilities, [[0.75, 0.25]], atol=0.01)


def test_only_sizes_that_take_at_most_a_minute_are_fitted():
    assert head_solver.fits(2400, 2048, 2)
    assert head_solver.fits(10_000, 2048, 10)
    assert not head_solver.fits(100_000, 2048, 2)
    assert not head_solver.fits(10_000, 2048, 1000)
    assert not head_solver.fits(2400, 2048 * 49, 2)  # --head=flatten at 224 pixels
