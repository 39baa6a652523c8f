"""Fits the head to its optimum: logistic regression on features, its regularization chosen by cross-validation.

Shapes: N training examples, F features, C classes.
"""

import dataclasses
import warnings
from typing import Any

import numpy as np
import threadpoolctl

# Up to these sizes the fit takes from less than a second to about a minute on two cores, and its float64 copy of the
# features 200 MB. Beyond them an epoch has so many steps that epochs train the head as well.
MAX_FEATURE_VALUES = 25_000_000  # N * F: 12,000 images of 2,048 features
MAX_LOGIT_VALUES = 400_000_000  # N * F * C
# Candidates for C, the inverse of the L2 regularization, for features of mean 0 and standard deviation 1. On six image
# sets of 32 to 2,400 training images the best one was 0.0003 to 0.1.
CANDIDATES = np.logspace(-4.5, 0.5, 11)
FOLDS = 5
DEFAULT_C = 0.01  # where no class has two images, so that nothing can be cross-validated
TOLERANCE = 1e-6  # of the gradient
SEARCH_TOLERANCE = 1e-3  # finds the same C in a third of the time
MAX_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class HeadFit:
    """A fitted head: logits = features @ kernel + bias. `cross_validated_accuracy` is None if nothing was validated."""

    kernel: np.ndarray  # float32 [F, C]
    bias: np.ndarray  # float32 [C]
    inverse_regularization: float  # C of scikit-learn
    cross_validated_accuracy: float | None


def fits(num_examples: int, num_features: int, num_classes: int) -> bool:
    """Whether `fit` takes at most about a minute for features of this size."""
    num_values = num_examples * num_features
    return num_values <= MAX_FEATURE_VALUES and num_values * num_classes <= MAX_LOGIT_VALUES


def fit(features: np.ndarray, labels: np.ndarray, *, num_classes: int, is_balanced: bool, seed: int) -> HeadFit:
    """Logistic regression on features float32 [N, F] and labels int [N]; every class has an example.

    C has the lowest cross-validated log loss, that is, it makes the probabilities honest and not only the labels right.
    With `is_balanced`, each class counts as much as any other in the loss and in the choice of C. The same arguments
    give the same fit on the same machine.
    """
    mean, scale = features.mean(axis=0, dtype=np.float64), float(features.std(axis=0, dtype=np.float64).mean()) or 1.0
    centered = (features - mean) / scale
    # Rotated to the N directions that the examples span: the same problem, smaller where there are few examples.
    basis = np.linalg.qr(centered.T)[0] if 2 * len(features) <= features.shape[1] else None  # [F, N]
    inputs = centered if basis is None else centered @ basis
    # One thread: the products are small, and several threads spend twenty times the CPU time on waiting for each other.
    with threadpoolctl.threadpool_limits(1):
        model, accuracy = _fit_logistic_regression(inputs, labels, is_balanced, seed)
    kernel, bias = model.coef_.T, model.intercept_  # [F or N, C], [C]
    if num_classes == 2:  # scikit-learn fits one logit, that of the second class against the first
        kernel, bias = np.hstack([-kernel / 2, kernel / 2]), np.array([-bias[0] / 2, bias[0] / 2])
    kernel = (kernel if basis is None else basis @ kernel) / scale
    return HeadFit(
        kernel=kernel.astype(np.float32),
        bias=(bias - mean @ kernel).astype(np.float32),
        inverse_regularization=model.C,
        cross_validated_accuracy=accuracy,
    )


def _fit_logistic_regression(
    inputs: np.ndarray, labels: np.ndarray, is_balanced: bool, seed: int
) -> tuple[Any, float | None]:
    """A fitted LogisticRegression and its cross-validated accuracy."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model = LogisticRegression(
        C=DEFAULT_C, class_weight="balanced" if is_balanced else None, max_iter=MAX_ITERATIONS, tol=TOLERANCE
    )
    accuracy = None
    counts = np.bincount(labels)
    is_validated = counts[labels] >= 2  # a class with one image cannot be in both sides of a fold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit of MAX_ITERATIONS is usable
        if len(np.unique(labels[is_validated])) >= 2:
            data = inputs[is_validated], labels[is_validated]
            folds = StratifiedKFold(min(FOLDS, counts[counts >= 2].min()), shuffle=True, random_state=seed)
            search = LogisticRegressionCV(
                Cs=CANDIDATES,
                l1_ratios=(0,),
                cv=folds,
                scoring=_balanced_log_likelihood if is_balanced else "neg_log_loss",
                refit=False,
                use_legacy_attributes=False,
                class_weight=model.class_weight,
                max_iter=MAX_ITERATIONS,
                tol=SEARCH_TOLERANCE,
            )
            scores = search.fit(*data).scores_.reshape(folds.n_splits, len(CANDIDATES))
            model.set_params(C=float(CANDIDATES[scores.mean(axis=0).argmax()]))
            accuracy = float(np.mean(cross_val_predict(model, *data, cv=folds) == data[1]))
        model.fit(inputs, labels)
    return model, accuracy


def _balanced_log_likelihood(model: Any, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the mean log probability of their examples."""
    of_label = model.predict_log_proba(inputs)[np.arange(len(labels)), np.searchsorted(model.classes_, labels)]
    return float(np.mean([of_label[labels == label].mean() for label in np.unique(labels)]))
