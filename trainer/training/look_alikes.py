"""Validation images that look like a training image: their accuracy is that of images which the head has seen.

Shapes: N training and V validation images, F features, C classes.
"""

from typing import Any, NamedTuple

import numpy as np
from absl import logging

from trainer.artifacts.best_weights import BestEpoch
from trainer.training.inference import ModelOutputs
from trainer.training.stages import StageInputs

# Of the features of two images. Of 100 copies (resized, recompressed, cropped, flipped) of 3,000 photos of cats and dogs,
# 98 were above it and the others above 0.947; no two of the photos had more than 0.942. Where all images have one background
# or one camera angle, different images reach 0.97, and the features do not tell copies from them.
MIN_COSINE = 0.95
MAX_COMPARISONS = 1_000_000_000  # of a validation and a training image; about 6 minutes on two cores
MAX_GROUPED_IMAGES = 100_000  # compared with each other; about 20 minutes on two cores
_ROWS = 128  # images whose neighbors are listed at once; in the worst case all images are neighbors
MAX_PAIRS = 12  # in metrics.json and in the report


class LookAlikes(NamedTuple):
    """Validation images by their index, each with its nearest training image and the cosine; the most alike first."""

    validation: np.ndarray  # int [K]
    training: np.ndarray  # int [K]
    cosines: np.ndarray  # float [K]
    examined: np.ndarray  # int, all validation images that were compared


def find(training: ModelOutputs, validation: ModelOutputs) -> LookAlikes:
    """The validation images whose features have a cosine above MIN_COSINE with those of a training image.

    The features are float32 [N, F] and [V, F]; images that could not be read are left out. The time grows with N * V: on
    two cores it is a second for 2,400 and 600 images, half a minute for 20,000 and 5,000. Beyond MAX_COMPARISONS, evenly
    spaced validation images are compared. The memory is that of a copy of the features.
    """
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    indices = [np.flatnonzero(side.is_readable) for side in (training, validation)]
    if not all(map(len, indices)):
        return LookAlikes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    indices[1] = indices[1][:: -(-len(indices[0]) * len(indices[1]) // MAX_COMPARISONS)]
    units = [
        normalize(side.values[index], copy=False) for side, index in zip((training, validation), indices, strict=True)
    ]
    # Of vectors of length 1, the nearest is the one of the highest cosine, and scikit-learn finds it in blocks.
    distances, nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(units[0]).kneighbors(units[1])
    cosines = 1 - distances[:, 0] ** 2 / 2
    found = np.flatnonzero(cosines > MIN_COSINE)
    found = found[np.argsort(-cosines[found], kind="stable")]
    return LookAlikes(indices[1][found], indices[0][nearest[found, 0]], cosines[found], indices[1])


def groups(features: ModelOutputs) -> np.ndarray:
    """The group of each image, int64 [N]: connected by pairs whose features float32 [N, F] have a cosine above MIN_COSINE.

    An image that could not be read is its own group. The time grows with the square of N: on two cores it is ten seconds
    for 10,000 images. The memory is that of a copy of the features and of _ROWS rows of cosines.
    """
    from scipy.sparse import coo_array, csgraph
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    group = np.arange(len(features.values))
    readable = np.flatnonzero(features.is_readable)
    if not len(readable):
        return group
    units = normalize(features.values[readable], copy=False)
    neighbors = NearestNeighbors(algorithm="brute", radius=np.sqrt(2 - 2 * MIN_COSINE)).fit(units)
    for start in range(0, len(units), _ROWS):
        rows, columns = neighbors.radius_neighbors_graph(units[start : start + _ROWS]).nonzero()
        edges = (np.ones(len(rows), bool), (group[readable[rows + start]], group[readable[columns]]))
        group = csgraph.connected_components(coo_array(edges, shape=(len(group),) * 2), directed=False)[1][group]
    return group


def review(
    inputs: StageInputs, features: ModelOutputs | None, best: BestEpoch, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """The entry `look_alikes` of metrics.json, which is also logged; {} without `features`, in the order of images.paths.

    The entry has the number of look-alikes among the examined validation images, the accuracy on the others (None if there
    are none), and the first pairs.
    """
    if features is None:
        return {}
    split = inputs.split
    sides = [ModelOutputs(features.values[i], features.is_readable[i]) for i in inputs.images.split_indices]
    alike = find(*sides)
    is_correct = best.probabilities.argmax(axis=1) == split.validation.labels
    is_other = np.zeros(len(is_correct), bool)
    is_other[alike.examined] = best.is_readable[alike.examined]
    is_other[alike.validation] = False
    accuracy = float(is_correct[is_other].mean()) if is_other.any() else None
    pairs = [
        {
            "path": str(split.validation.paths[i]),
            "label": class_names[split.validation.labels[i]],
            "training_path": str(split.training.paths[j]),
            "training_label": class_names[split.training.labels[j]],
            "cosine": round(float(cosine), 4),
        }
        for i, j, cosine in zip(*(column[:MAX_PAIRS] for column in alike[:3]), strict=True)
    ]
    if pairs:
        _log(len(alike.validation), len(alike.examined), pairs[0], best.val_accuracy, accuracy)
    values = {
        "images": len(alike.validation),
        "examined": len(alike.examined),
        "val_accuracy_without": accuracy,
        "min_cosine": MIN_COSINE,
        "pairs": pairs,
    }
    return {"look_alikes": values}


def _log(count: int, num_validation: int, pair: dict[str, Any], accuracy: float, without: float | None) -> None:
    logging.warning(
        "%d of %d validation images look like a training image (the cosine of their features is above %g; the first: %r and "
        "%r, %.3f). The validation accuracy is %.4f, %s. To keep frames of one scene, or images of one patient, on one side, "
        "pass --group_by=REGEX or similar.%s",
        count,
        num_validation,
        MIN_COSINE,
        pair["path"],
        pair["training_path"],
        pair["cosine"],
        accuracy,
        "and no image is left without them" if without is None else f"without them {without:.4f}",
        " So many may just have the same background: look at the pairs in the report."
        if 2 * count > num_validation
        else "",
    )
