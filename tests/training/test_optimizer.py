"""Learning-rate schedules."""

import numpy as np

from trainer.training.optimizer import Recipe, learning_rate_schedule


def rates(**values) -> float | np.ndarray:
    """The learning rate, or that of each of 4 epochs of 10 steps."""
    recipe = Recipe(optimizer="sgd", learning_rate=0.1, **values)
    schedule = learning_rate_schedule(recipe, epochs=4, steps_per_epoch=10)
    return schedule if isinstance(schedule, float) else np.array([schedule(step) for step in range(41)])


def test_a_constant_rate_is_a_float():
    assert rates() == 0.1


def test_a_cosine_schedule_ends_at_zero():
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(41) / 40))
    np.testing.assert_allclose(rates(lr_schedule="cosine"), expected, atol=1e-6)


def test_warm_up_is_linear_before_a_constant_rate():
    expected = 0.1 * np.minimum(np.arange(41) / 5, 1)
    np.testing.assert_allclose(rates(warmup_epochs=0.5), expected, atol=1e-6)


def test_warm_up_is_linear_before_a_cosine_schedule():
    expected = np.r_[0.1 * np.arange(5) / 5, 0.05 * (1 + np.cos(np.pi * np.arange(36) / 35))]
    np.testing.assert_allclose(rates(lr_schedule="cosine", warmup_epochs=0.5), expected, atol=1e-6)
