"""The cross-validated accuracy of the head, and the images whose label another class contradicts.

Shapes: N images, C classes, F features.
"""

import dataclasses
from typing import Any

import numpy as np
from absl import logging

from trainer.artifacts.best_weights import BestEpoch
from trainer.artifacts.metrics import classification_metrics, describe_accuracy, estimate
from trainer.config import Config
from trainer.data.dataset import Examples
from trainer.training import head_solver
from trainer.training.inference import ModelOutputs
from trainer.training.stages import StageInputs


@dataclasses.dataclass(frozen=True, eq=False)
class LabelReview:
    """N labels and what predicts them: `probabilities` float32 [N, C] by a model that was not trained on the image."""

    examples: Examples
    probabilities: np.ndarray
    is_out_of_fold: bool  # by heads on the features of all images; else by the best weights on validation images
    cross_validated: dict[str, Any] | None = None  # metrics.estimate of the head

    @property
    def issues(self) -> np.ndarray:
        """Indices of the images of which another class is more probable than their label, least probable label first.

        The rule of cleanlab.filter.find_predicted_neq_given, in the order of cleanlab's self-confidence.
        """
        labels = self.examples.labels
        order = np.argsort(self.probabilities[np.arange(len(labels)), labels], kind="stable")
        return order[self.probabilities.argmax(axis=1)[order] != labels[order]]

    def listed(self) -> tuple[Examples, np.ndarray]:
        """The examples of `issues` and their probabilities float32 [issues, C], the rows of label_issues.csv."""
        return self.examples.take(self.issues), self.probabilities[self.issues]

    def metrics(self) -> dict[str, Any]:
        """The values of metrics.json: how many labels were examined, by what, and the number of rows to look at."""
        values: dict[str, Any] = {
            "label_issues": len(self.issues),
            "labels_examined": len(self.examples),
            "labels_judged_by": "out_of_fold" if self.is_out_of_fold else "validation",
        }
        return values | ({"cross_validated": self.cross_validated} if self.cross_validated else {})


def review(settings: Config, inputs: StageInputs, features: ModelOutputs | None, best: BestEpoch) -> LabelReview:
    """The review of a trained run; `features` are those of job_stages.read_features. Logs the result.

    Without features, and with more of them than can be cross-validated, only the validation labels are judged, by the best
    weights. Only the accuracy of a head that was trained alone is cross-validated.
    """
    result = None if features is None else _of_all_images(inputs, features)
    if result is None:
        examples = inputs.split.validation.take(best.is_readable)
        result = LabelReview(examples, best.probabilities[best.is_readable], is_out_of_fold=False)
    if settings.epochs:
        result = dataclasses.replace(result, cross_validated=None)
    if headline := result.cross_validated:
        logging.info(
            "Cross-validated accuracy: %s, of training and validation images, by heads that were fitted without the image.",
            describe_accuracy(headline["correct"], headline["images"]),
        )
    log_issues(result)
    return result


def of_features(
    examples: Examples, features: np.ndarray, *, num_classes: int, is_balanced: bool, seed: int
) -> LabelReview | None:
    """The review of N examples by their features float32 [N, F], with the cross-validated accuracy.

    None, for a reason that is logged, if the features are too many or no two classes have two different images each.
    """
    if not head_solver.fits(len(features), features.shape[1], num_classes):
        logging.info(
            "%d x %d features of %d classes are too many for cross-validation: there is no cross-validated accuracy, and "
            "labels of training images are not examined.",
            *features.shape,
            num_classes,
        )
        return None
    as_fitted, judging = head_solver.out_of_fold(
        features, examples.labels, examples.hashes, num_classes=num_classes, is_balanced=is_balanced, seed=seed
    )
    is_known = ~np.isnan(judging[:, 0])
    if not is_known.any():
        logging.info("No two classes have two different images each: nothing can be cross-validated.")
        return None
    examples, predicted = examples.take(is_known), as_fitted[is_known].argmax(axis=1)
    return LabelReview(
        examples,
        judging[is_known],
        is_out_of_fold=True,
        cross_validated=estimate(classification_metrics(examples.labels, predicted, num_classes)),
    )


def log_issues(result: LabelReview) -> None:
    """Logs how many labels were examined and how many another class contradicts."""
    logging.info(
        "Labels: for %d of %d %simages another class is more probable than the label (label_issues.csv).",
        len(result.issues),
        len(result.examples),
        "" if result.is_out_of_fold else "validation ",
    )


def _of_all_images(inputs: StageInputs, features: ModelOutputs) -> LabelReview | None:
    """The review of training and validation together, in the order of the paths."""
    images = inputs.images
    labels = np.full(len(images.paths), -1)
    for side, indices in zip((inputs.split.training, inputs.split.validation), images.split_indices, strict=False):
        labels[indices] = side.labels
    used = np.flatnonzero((labels >= 0) & features.is_readable)
    return of_features(
        Examples(images.paths[used], labels[used], np.array(images.hashes, object)[used]),
        features.values[used],
        num_classes=len(inputs.class_weights),
        is_balanced=bool((inputs.class_weights != 1).any()),
        seed=inputs.seed,
    )
