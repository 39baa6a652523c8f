"""The cost of a job over all its starts."""

import pytest

from trainer.training.cost import Cost


def test_the_cost_counts_all_machines_and_earlier_starts():
    now = [1000.0]
    cost = Cost(7.2, machines=3, limit=0, seconds_before=60, clock=lambda: now[0])
    now[0] += 40
    assert cost.seconds() == 100
    assert cost.total() == pytest.approx(7.2 * 3 * 100 / 3600)
    assert cost.total(100) == pytest.approx(7.2 * 3 * 200 / 3600)


def test_a_limit_is_reached_when_the_cost_equals_it():
    now = [0.0]
    limited, unlimited = (Cost(3600, machines=2, limit=limit, clock=lambda: now[0]) for limit in (20, 0))
    now[0] = 9.9
    assert not limited.limit_reached()
    now[0] = 10
    assert limited.limit_reached()
    assert not unlimited.limit_reached()
