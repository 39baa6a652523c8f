"""The plan of an epoch: each example counts once, in an order that depends on seed and epoch alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import sampler

NO_WEIGHTS = np.ones(2, np.float32)


def plan_of(num_examples, *, epoch=0, batch_size=8, replicas=1, seed=0, weights=NO_WEIGHTS):
    labels = np.arange(num_examples) % 2
    return sampler.shuffled_epoch(
        labels, seed=seed, epoch=epoch, batch_size=batch_size, replicas=replicas, class_weights=weights
    )


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 5))
def test_each_example_counts_once_and_each_batch_weighs_one(num_examples, batch_size, replicas):
    plan = plan_of(num_examples, batch_size=min(batch_size, num_examples), replicas=replicas)
    counted = plan.index[plan.weight > 0]
    assert sorted(counted) == list(range(num_examples))
    np.testing.assert_allclose(plan.loss_weight.sum(axis=(1, 2)), 1, rtol=1e-5)
    assert plan.index.shape[1] == replicas


@given(st.integers(2, 60), st.integers(1, 16), st.integers(2, 5))
def test_the_batches_are_the_same_on_any_number_of_replicas(num_examples, batch_size, replicas):
    one, many = (plan_of(num_examples, batch_size=min(batch_size, num_examples), replicas=r) for r in (1, replicas))
    for step in range(one.steps):
        is_one, is_many = one.weight[step] > 0, many.weight[step] > 0
        assert one.index[step][is_one].tolist() == many.index[step][is_many].tolist()
        assert one.row[step][is_one].tolist() == many.row[step][is_many].tolist()


def test_the_order_depends_on_epoch_and_seed_alone():
    first = plan_of(50).index.tolist()
    assert plan_of(50).index.tolist() == first
    assert plan_of(50, epoch=1).index.tolist() != first
    assert plan_of(50, seed=1).index.tolist() != first


def test_balanced_weights_of_two_classes():
    labels = np.array([0] * 9 + [1] * 3)
    np.testing.assert_allclose(sampler.class_weights(labels, 2, "balanced"), [12 / 18, 12 / 6])
    np.testing.assert_allclose(sampler.class_weights(labels, 2, "none"), [1, 1])


def test_a_class_with_less_than_a_tenth_of_the_largest_is_reported():
    assert not sampler.describe_imbalance({"a": 100, "b": 10}, "none")
    text = sampler.describe_imbalance({"a": 1000, "b": 40, "c": 90}, "none")
    assert text.startswith("The class “b” has 40 images, “a” has 1,000. --class_weight=balanced would count an image")
    assert "25 times" in text
    assert sampler.describe_imbalance({"a": 100, "b": 1}, "balanced").endswith("counts each class equally in the loss.")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_balanced_weights_give_each_class_the_same_sum(labels):
    labels = np.array(labels)
    weights = sampler.class_weights(labels, 5, "balanced")
    sums = np.bincount(labels, weights=weights[labels], minlength=5)
    present = np.bincount(labels, minlength=5) > 0
    np.testing.assert_allclose(sums[present], len(labels) / 5, rtol=1e-5)
    assert np.isfinite(weights).all()
    assert (sampler.class_weights(labels, 5, "none") == 1).all()
