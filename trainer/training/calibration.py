"""A temperature that brings the probabilities of a trained network closer to the share of its correct predictions.

Temperature scaling (Guo et al., 2017, arXiv:1706.04599) divides the logits by one number: below 1 it makes the network
more confident, above 1 less. No label changes. Shapes: V validation images, C classes.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from trainer.artifacts.metrics import expected_calibration_error, top_class

# The logarithm of the temperature has a normal prior with mean 0, a temperature of 1, and this standard deviation. Few
# images hardly move it: 6 correct ones would otherwise ask for a temperature of 0.
PRIOR_STANDARD_DEVIATION = 0.4
BOUNDS = (0.2, 5.0)
FOLDS = 5
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A temperature, and the expected calibration error without it and with it.

    `ece_after` is out of fold: of each image with a temperature that other images gave. `low` and `high` are its 95 %
    interval.
    """

    temperature: float
    ece_before: float
    ece_after: float
    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        """As the value of metrics.json."""
        return dataclasses.asdict(self)


def calibrate(probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
    """Fits the temperature to probabilities float32 [V, C] and labels int [V] of V > 0 images."""
    correct = probabilities.argmax(axis=1) == labels
    fold = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    top = np.zeros(len(labels))
    for number in range(min(FOLDS, len(labels))):
        is_left_out = fold == number
        temperature = _fit(probabilities[~is_left_out], labels[~is_left_out])
        top[is_left_out] = top_class(apply(probabilities[is_left_out], temperature))[1]
    error = expected_calibration_error(top, correct)
    low, high = _interval(top, correct, error)
    return Calibration(
        temperature=_fit(probabilities, labels),
        ece_before=expected_calibration_error(top_class(probabilities)[1], correct),
        ece_after=error,
        low=low,
        high=high,
    )


def apply(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """The probabilities float32 [V, C] that the network gives with its logits divided by the temperature."""
    return np.exp(_log_probabilities(probabilities, temperature)).astype(np.float32)


def _log_probabilities(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    # Logarithms of probabilities are logits: they differ by a constant per image, which the softmax removes.
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny, dtype=np.float64)) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _fit(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The most probable temperature, rounded; 1 if no image is wrong, since nothing then says how often errors occur."""
    rows = np.arange(len(labels))
    if (probabilities.argmax(axis=1) == labels).all():
        return 1.0

    def cost(logarithm: float) -> float:
        log_likelihood = _log_probabilities(probabilities, np.exp(logarithm))[rows, labels].sum()
        return float(0.5 * (logarithm / PRIOR_STANDARD_DEVIATION) ** 2 - log_likelihood)

    found = minimize_scalar(cost, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-3})
    return round(float(np.exp(found.x)), 4)


def _interval(top: np.ndarray, correct: np.ndarray, error: float) -> tuple[float, float]:
    """The 95 % interval of the calibration error by a basic bootstrap (Davison and Hinkley, 1997, 5.2), with `error` in it.

    A sample's error lies above that of all images, and a resample's above that of the sample, by about as much: the basic
    bootstrap subtracts this difference.
    """
    random = np.random.default_rng(0)
    errors = []
    for _ in range(RESAMPLES):
        index = random.integers(0, len(top), len(top))
        errors.append(expected_calibration_error(top[index], correct[index]))
    lower, upper = np.quantile(errors, (0.025, 0.975))
    return max(0.0, min(error, 2 * error - upper)), min(1.0, max(error, 2 * error - lower))
