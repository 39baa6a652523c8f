"""The readings and the targets of a suite."""

import pytest

from trainer.benchmarks.suite import Target, Usage, rates


def test_rates_are_per_second_and_per_1000_images():
    assert rates(50, Usage(10.0, 100.0), Usage(12.0, 101.0)) == {
        "images_per_second": 25.0,
        "cpu_seconds_per_1000": 20.0,
    }


@pytest.mark.parametrize(("at_least", "met"), [(True, [False, True, True]), (False, [True, True, False])])
def test_a_target_is_a_lower_or_an_upper_bound(at_least, met):
    target = Target("x", metric="s", numerator="f", denominator="g", bound=2.0, at_least=at_least)
    assert [target.is_met(ratio) for ratio in (1.0, 2.0, 3.0)] == met
