"""The temperature makes probabilities honest, changes no label, and few images do not move it far."""

import numpy as np
import pytest

from trainer.training import calibration


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def draw(num_images: int, *, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [V, 4] of logits that are `factor` times the honest ones, and labels [V] drawn from those."""
    random = np.random.default_rng(3)
    logits = random.normal(0, 2, (num_images, 4))
    uniform = random.uniform(size=(num_images, 1))
    labels = (uniform > softmax(logits).astype(np.float64).cumsum(axis=1)).sum(axis=1).clip(0, 3)
    return softmax(factor * logits), labels


@pytest.mark.parametrize("factor", [0.4, 3])
def test_the_temperature_of_logits_that_are_too_large_or_small_is_their_factor(factor):
    probabilities, labels = draw(3000, factor=factor)
    result = calibration.calibrate(probabilities, labels)
    assert result.temperature == pytest.approx(factor, rel=0.15)
    assert result.low <= result.ece_after <= result.high < 0.04 < 0.1 < result.ece_before
    calibrated = calibration.apply(probabilities, result.temperature)
    np.testing.assert_array_equal(calibrated.argmax(axis=1), probabilities.argmax(axis=1))


def test_the_calibrated_probabilities_are_those_of_the_divided_logits():
    logits = np.random.default_rng(0).normal(0, 5, (50, 7))
    np.testing.assert_allclose(calibration.apply(softmax(logits), 1.7), softmax(logits / 1.7), rtol=1e-4)


def test_without_a_wrong_image_the_probabilities_stay():
    probabilities, _ = draw(500, factor=0.2)
    result = calibration.calibrate(probabilities, probabilities.argmax(axis=1))
    assert result.temperature == 1
    assert result.ece_after == result.ece_before


@pytest.mark.parametrize("num_wrong", [1, 3])
def test_six_images_hardly_move_the_temperature(num_wrong):
    probabilities = np.tile(np.float32([[0.9, 0.1]]), (6, 1))
    labels = np.arange(6) < num_wrong
    assert 0.6 < calibration.calibrate(probabilities, labels.astype(int)).temperature < 2


def test_one_image_has_a_result():
    result = calibration.calibrate(np.float32([[0.3, 0.7]]), np.array([0]))
    assert 0 <= result.low <= result.ece_after <= result.high <= 1
