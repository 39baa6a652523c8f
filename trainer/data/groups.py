"""Groups of images that stay on one side of the split: of one scene, one patient, one camera.

No TensorFlow. Shapes: N examples, G groups.
"""

import hashlib
import re

import numpy as np
from absl import logging

from trainer.data.dataset import Examples
from trainer.errors import UserError


def names_in_paths(paths: np.ndarray, pattern: str) -> np.ndarray:
    """The group of each image, str objects [N]: the first group of the regular expression, or its whole match, in the path.

    "" where it matches nothing. Raises UserError if that is so in every path.
    """
    compiled = re.compile(pattern)
    matches = [compiled.search(path) for path in paths]
    names = np.array([(match[1 if compiled.groups else 0] or "") if match else "" for match in matches], object)
    unnamed = np.flatnonzero(names == "")
    if len(unnamed) == len(paths):
        raise UserError(
            f"--group_by={pattern} matches nothing in the paths of the images (the first: {str(paths[0])!r}): pass a regular "
            "expression that finds the name of the scene, patient or camera there."
        )
    if len(unnamed):
        logging.warning(
            "--group_by=%s matches nothing in %d of %d paths (the first: %r): each of these images is a group of its own.",
            pattern,
            len(unnamed),
            len(paths),
            paths[unnamed[0]],
        )
    return names


def names_of_similar(groups: np.ndarray, examples: Examples) -> np.ndarray:
    """The names of groups int [N] that were found by looking: of two images or more, their lowest hash; "" of one image."""
    names = np.full(len(groups), "", object)
    order = np.lexsort((examples.hashes.astype(str), groups))
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(members) > 1:
            names[members] = examples.hashes[members[0]]
    return names


def hold_out(examples: Examples, names: np.ndarray, fraction: float) -> np.ndarray:
    """Which examples are held out, bool [N]: whole groups, so that each class is as near to `fraction` as these allow.

    `names` are the groups, str objects [N]; an example without one ("") is its own. Groups that have an equal content
    within a class are one group. The order is that of a hash of the name, or of the content where there is no name, so
    that it does not depend on the machine, and new files move only groups at the border. A group is held out if this
    brings its classes closer to their fractions, by the sum of squares where it has several. Every class keeps a group
    in training; one with two groups or more has at least one held out, where groups of several classes allow it.
    """
    group_of, order = _connected(examples, names)
    num_classes = int(examples.labels.max()) + 1
    pairs, sizes = np.unique(group_of * num_classes + examples.labels, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs // num_classes, prepend=-1))[1:]
    classes_of, sizes_of = np.split(pairs % num_classes, starts), np.split(sizes, starts)  # of each group
    totals = np.bincount(examples.labels, minlength=num_classes)
    targets = np.maximum(1, np.round(totals * fraction))
    num_held = np.zeros(num_classes, np.int64)
    is_held = np.zeros(len(order), bool)

    def is_possible(group: int) -> bool:
        classes = classes_of[group]
        return bool((num_held[classes] + sizes_of[group] < totals[classes]).all())

    def hold(group: int) -> None:
        is_held[group] = True
        num_held[classes_of[group]] += sizes_of[group]

    for group in order:
        classes, size = classes_of[group], sizes_of[group]
        missing = targets[classes] - num_held[classes]
        squares = [((left / totals[classes]) ** 2).sum() for left in (missing - size, missing)]
        if squares[0] <= squares[1] and is_possible(group):
            hold(group)
    for label in np.flatnonzero((num_held == 0) & (totals > 0)):  # its groups are all larger than twice the fraction
        candidates = [group for group in order if label in classes_of[group] and is_possible(group)]
        if candidates and not num_held[label]:
            hold(min(candidates, key=lambda group: sizes_of[group].sum()))
    return is_held[group_of]


def _connected(examples: Examples, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The group of each example, int [N], and the groups in the order of the hashes of their names, int [G]."""
    from scipy.sparse import coo_array, csgraph

    contents = [f"{label} {content}" for label, content in zip(examples.labels, examples.hashes, strict=True)]
    content_ids = np.unique(contents, return_inverse=True)[1]
    name_ids = content_ids.max() + 1 + np.unique(names.astype(str), return_inverse=True)[1]
    is_named = names != ""
    edges = (np.ones(is_named.sum(), bool), (content_ids[is_named], name_ids[is_named]))
    num_nodes = int(name_ids.max()) + 1
    component = csgraph.connected_components(coo_array(edges, shape=(num_nodes, num_nodes)), directed=False)[1]
    group_of = np.unique(component[content_ids], return_inverse=True)[1]
    hashes = [
        hashlib.md5(name.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest() if name else content
        for name, content in zip(names, examples.hashes, strict=True)
    ]
    by_hash = np.argsort(np.array(hashes, object), kind="stable")
    first = np.unique(group_of[by_hash], return_index=True)[1]  # of each group, its lowest hash
    return group_of, np.argsort(first)
