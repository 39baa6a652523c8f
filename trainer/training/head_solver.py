"""Fits the head to its optimum: logistic regression on features, its regularization chosen by cross-validation.

The same regression judges labels: it predicts each example by a head that was fitted without it.
Shapes: N examples, F features, C classes.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
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
    inputs, basis = _rotated((features - mean) / scale)
    with _quiet_on_one_thread():
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


def out_of_fold(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, num_classes: int, is_balanced: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two predictions of each example by heads that were fitted without it: probabilities float32 [N, C] each.

    The first is that of heads like the one of `fit`: as good as that one is on new examples. The second judges labels: its
    heads are fitted without the labels that the first contradicts, which had pulled their heads to their side, and each
    class counts as much as any other. There are FOLDS stratified folds; examples of one value of `groups` [N] are in the
    same one. C is chosen as in `fit`, in these folds. The rows of a class with less than two groups are NaN: a head that
    was fitted without them cannot know the class.
    """
    as_fitted, judging = np.full((2, len(labels), num_classes), np.nan, np.float32)
    fold = _folds(labels, groups, seed)
    known = np.flatnonzero(fold >= 0)
    if not len(known):
        return as_fitted, judging
    as_fitted[known], judging[known] = 0.0, 0.0  # also of the classes that no head knows
    values, labels, fold = features[known], labels[known], fold[known]
    scale = float(values.std(axis=0, dtype=np.float64).mean()) or 1.0
    inputs, _ = _rotated((values - values.mean(axis=0, dtype=np.float64)) / scale)
    folds = [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in np.unique(fold)]
    with _quiet_on_one_thread():
        model = _logistic_regression(is_balanced)
        _choose_regularization(model, inputs, labels, folds)
        for fitted, predicted in folds:
            model.fit(inputs[fitted], labels[fitted])
            as_fitted[np.ix_(known[predicted], model.classes_)] = model.predict_proba(inputs[predicted])
        is_confirmed = as_fitted[known].argmax(axis=1) == labels
        model.set_params(class_weight="balanced")
        for fitted, predicted in folds:
            fitted = fitted[_is_trusted(labels[fitted], is_confirmed[fitted])]
            model.fit(inputs[fitted], labels[fitted])
            judging[np.ix_(known[predicted], model.classes_)] = model.predict_proba(inputs[predicted])
    return as_fitted, judging


def _folds(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each example, int [N]; -1 for a class with less than two groups, and if fewer than two classes have more."""
    from sklearn.model_selection import StratifiedKFold

    _, first, group = np.unique(groups.astype(str), return_index=True, return_inverse=True)
    label_of_group = labels[first]  # the first one, where a group has two
    counts = np.bincount(label_of_group, minlength=labels.max() + 1)
    known = np.flatnonzero(counts[label_of_group] >= 2)
    fold_of_group = np.full(len(first), -1)
    if len(np.unique(label_of_group[known])) >= 2:
        splitter = StratifiedKFold(min(FOLDS, counts.max()), shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with two groups is in two of the folds
            for number, (_, held_out) in enumerate(splitter.split(known, label_of_group[known])):
                fold_of_group[known[held_out]] = number
    return np.where(counts[labels] >= 2, fold_of_group[group], -1)


def _is_trusted(labels: np.ndarray, is_confirmed: np.ndarray) -> np.ndarray:
    """Which labels [N] judge others: the confirmed ones; all of a class of which most are not, for it is hard, not wrong."""
    share = np.bincount(labels, is_confirmed) / np.maximum(np.bincount(labels), 1)  # [C]
    return is_confirmed | (share < 0.5)[labels]


def _rotated(centered: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Features float64 [N, F] in a basis [F, N] of the N directions that they span; as they are, and None, if N is large.

    The same problem, smaller where there are few examples.
    """
    if 2 * len(centered) > centered.shape[1]:
        return centered, None
    basis = np.linalg.qr(centered.T)[0]
    return centered @ basis, basis


@contextlib.contextmanager
def _quiet_on_one_thread() -> Iterator[None]:
    """One thread: the products are small, and several threads spend twenty times the CPU time on waiting for each other."""
    from sklearn.exceptions import ConvergenceWarning

    with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit of MAX_ITERATIONS is usable
        yield


def _logistic_regression(is_balanced: bool) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(
        C=DEFAULT_C, class_weight="balanced" if is_balanced else None, max_iter=MAX_ITERATIONS, tol=TOLERANCE
    )


def _fit_logistic_regression(
    inputs: np.ndarray, labels: np.ndarray, is_balanced: bool, seed: int
) -> tuple[Any, float | None]:
    """A fitted LogisticRegression and its cross-validated accuracy."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model = _logistic_regression(is_balanced)
    accuracy = None
    counts = np.bincount(labels)
    is_validated = counts[labels] >= 2  # a class with one image cannot be in both sides of a fold
    if len(np.unique(labels[is_validated])) >= 2:
        data = inputs[is_validated], labels[is_validated]
        splitter = StratifiedKFold(min(FOLDS, counts[counts >= 2].min()), shuffle=True, random_state=seed)
        folds = list(splitter.split(*data))
        _choose_regularization(model, *data, folds)
        accuracy = float(np.mean(cross_val_predict(model, *data, cv=folds) == data[1]))
    model.fit(inputs, labels)
    return model, accuracy


def _choose_regularization(model: Any, inputs: np.ndarray, labels: np.ndarray, folds: list) -> None:
    """Sets C of `model` to the candidate with the best log likelihood in the folds, pairs of indices (fitted, held out)."""
    from sklearn.linear_model import LogisticRegressionCV

    search = LogisticRegressionCV(
        Cs=CANDIDATES,
        l1_ratios=(0,),
        cv=folds,
        scoring=_balanced_log_likelihood if model.class_weight else _log_likelihood,
        refit=False,
        use_legacy_attributes=False,
        class_weight=model.class_weight,
        max_iter=MAX_ITERATIONS,
        tol=SEARCH_TOLERANCE,
    )
    scores = search.fit(inputs, labels).scores_.reshape(len(folds), len(CANDIDATES))
    model.set_params(C=float(CANDIDATES[scores.mean(axis=0).argmax()]))


def _log_likelihood(model: Any, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Mean log probability of the labels. Unlike scikit-learn's score, some classes may have none."""
    return float(_of_label(model, inputs, labels).mean())


def _balanced_log_likelihood(model: Any, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the mean log probability of their examples."""
    of_label = _of_label(model, inputs, labels)
    return float(np.mean([of_label[labels == label].mean() for label in np.unique(labels)]))


def _of_label(model: Any, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return model.predict_log_proba(inputs)[np.arange(len(labels)), np.searchsorted(model.classes_, labels)]
