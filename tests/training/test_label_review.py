"""Wrong labels come first, look-alikes of equal content judge none, and the headline is that of heads without the image."""

from types import SimpleNamespace

import numpy as np
import pytest

from trainer.artifacts.best_weights import BestEpoch
from trainer.data.dataset import Examples, Split
from trainer.training import head_solver, label_review
from trainer.training.inference import ModelOutputs

NUM_FEATURES = 40


def make_examples(counts: list[int], *, seed: int = 0, separation: float = 0.7) -> tuple[Examples, np.ndarray]:
    """Examples of classes with so many images each, and features float32 [N, F] of which a few are hard."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centers = rng.normal(size=(len(counts), NUM_FEATURES)) * separation
    features = 3 + 0.2 * (centers[labels] + rng.normal(size=(len(labels), NUM_FEATURES)))
    names = np.array([f"{label}/{number:04d}.jpg" for number, label in enumerate(labels)], object)
    return Examples(names, labels, names), features.astype(np.float32)


def review_of(examples: Examples, features: np.ndarray, num_classes: int) -> label_review.LabelReview:
    result = label_review.of_features(examples, features, num_classes=num_classes, is_balanced=False, seed=0)
    assert result
    return result


@pytest.mark.parametrize("num_classes", [2, 6])
def test_nine_of_ten_swapped_labels_are_among_the_first_rows(num_classes):
    examples, features = make_examples([300 // num_classes] * num_classes)
    rng = np.random.default_rng(1)
    swapped = rng.choice(len(examples), 15, replace=False)
    examples.labels[swapped] = (examples.labels[swapped] + rng.integers(1, num_classes, 15)) % num_classes
    issues = review_of(examples, features, num_classes).issues
    assert len(set(issues[:15]) & set(swapped)) >= 0.9 * 15


def test_copies_of_an_image_are_in_one_fold():
    examples, features = make_examples([20, 20], seed=1, separation=0)  # the labels are chance
    twice = np.repeat(np.arange(40), 2)
    copies = review_of(examples.take(twice), features[twice], 2)
    assert copies.cross_validated["accuracy"] < 0.65
    as_others = Examples(examples.paths[twice], examples.labels[twice], np.arange(80).astype(str).astype(object))
    assert review_of(as_others, features[twice], 2).cross_validated["accuracy"] > 0.75


def test_a_rare_class_is_not_taken_for_wrong_labels():
    examples, features = make_examples([200, 6])
    result = review_of(examples, features, 2)
    assert len(result.issues) <= 6
    assert (result.examples.labels[result.issues] == 1).sum() <= 2


def test_a_class_of_one_image_is_left_out():
    examples, features = make_examples([30, 20, 1])
    result = review_of(examples, features, 3)
    assert len(result.examples) == result.cross_validated["images"] == 50
    assert np.isfinite(result.probabilities).all()


def make_run(settings: dict, features: np.ndarray, examples: Examples) -> label_review.LabelReview:
    """The review of a run that holds out every fourth image, of which the weights take each for the first class."""
    held_out = np.arange(len(examples)) % 4 == 0
    split = Split(examples.take(~held_out), examples.take(held_out))
    images = SimpleNamespace(
        paths=examples.paths,
        hashes=examples.hashes.tolist(),
        split_indices=[np.flatnonzero(~held_out), np.flatnonzero(held_out)],
    )
    inputs = SimpleNamespace(split=split, images=images, class_weights=np.ones(2, np.float32), seed=0)
    probabilities = np.tile(np.array([[0.9, 0.1]], np.float32), (held_out.sum(), 1))
    best = BestEpoch(1, 0.5, 1.0, 0.5, probabilities, np.ones(held_out.sum(), bool))
    outputs = None if features is None else ModelOutputs(features, np.arange(len(examples)) != 5)
    return label_review.review(SimpleNamespace(**settings), inputs, outputs, best)


def test_all_readable_images_are_examined_and_the_head_alone_has_a_headline():
    examples, features = make_examples([40, 40])
    values = make_run({"epochs": 0}, features, examples).metrics()
    assert values["labels_judged_by"] == "out_of_fold"
    assert values["labels_examined"] == values["cross_validated"]["images"] == 79
    assert "cross_validated" not in make_run({"epochs": 2}, features, examples).metrics()


def test_without_usable_features_the_best_weights_judge_validation(monkeypatch):
    examples, features = make_examples([40, 40])
    monkeypatch.setattr(head_solver, "MAX_FEATURE_VALUES", features.size)
    for settings, given in (
        ({"epochs": 2}, None),
        ({"epochs": 0}, np.tile(features, 2)),  # too many
    ):
        result = make_run(settings, given, examples)
        assert result.metrics() == {"label_issues": 10, "labels_examined": 20, "labels_judged_by": "validation"}
        assert set(result.examples.labels[result.issues]) == {1}
