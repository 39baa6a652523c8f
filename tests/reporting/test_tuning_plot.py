"""The figure of a study has axes that a reader can take at their word."""

import optuna
import pytest

from trainer.reporting import tuning_plot


def test_trials_are_whole_numbers_and_no_accuracy_is_above_1():
    study = optuna.create_study(direction="maximize")
    distribution = {"dropout": optuna.distributions.FloatDistribution(0, 1)}
    for value in (0.99, 1.0, 1.0):
        study.add_trial(optuna.create_trial(params={"dropout": value / 2}, distributions=distribution, value=value))
    figure = tuning_plot.draw(study.trials, ["dropout"], {})
    figure.draw_without_rendering()
    trials, _ = figure.axes
    low, high = trials.get_ylim()
    assert high == pytest.approx(1, abs=0.005)
    assert all(tick <= 1 for tick in trials.get_yticks() if low <= tick <= high)
    assert all(tick == int(tick) for tick in trials.get_xticks())
