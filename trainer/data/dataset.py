"""Reads a folder of images, one sub-folder per class, into Examples.

No TensorFlow: errors of the folder are reported before TensorFlow's import, which takes four seconds.
Shapes: N examples, C classes.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from absl import logging

from trainer.data import file_checks, label_file, shards
from trainer.data.listing import BadFile, SplitFolders, list_files, side_of
from trainer.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N images: name (see listing.escape_name), class index, MD5 of the content as hex; a group, if a label file names it."""

    paths: np.ndarray  # str objects [N]
    labels: np.ndarray  # int32 [N]
    hashes: np.ndarray  # str objects [N]
    groups: np.ndarray | None = None  # str objects [N]; empty: a group of its own

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at those indices (or where a boolean mask is true), in that order."""
        groups = None if self.groups is None else self.groups[indices]
        return Examples(self.paths[indices], self.labels[indices], self.hashes[indices], groups)

    def __len__(self) -> int:
        return len(self.paths)


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """The contents of a data directory: classes and readable examples in sorted order, bad files."""

    class_names: tuple[str, ...]
    examples: Examples
    bad_files: tuple[BadFile, ...]
    formats: frozenset[str] = frozenset()  # of the examples, as in formats.detect_format
    pack: shards.Pack | None = None  # the shards that hold the images
    split_folders: SplitFolders | None = None  # if the folder is split already
    notes: tuple[str, ...] = ()  # what of the folder is not used, and how it was recognized
    labels_file: str = ""  # the file that names images and labels, if not the folders do
    sides: np.ndarray | None = None  # str objects [N]: training, validation, test or empty, if a label file says so


NO_EXAMPLES = Examples(np.array([], object), np.array([], np.int32), np.array([], object))


class Split(NamedTuple):
    """The sides of a split; within a class, a split by content has no content on two sides.

    Test images are not used before the model is exported: neither training nor a choice reads them.
    """

    training: Examples
    validation: Examples
    test: Examples = NO_EXAMPLES


def read_folder(
    data_dir: str,
    *,
    max_bad_fraction: float = 1.0,
    progress: bool = False,
    read_parallelism: int = 0,
    min_classes: int = 2,
    labels_file: str = "",
) -> Folder:
    """Checks every file below `data_dir`/CLASS/ once, in parallel: its hash, and whether it looks like an image.

    A bucket lists the hashes, so only the ends of an object are read, `read_parallelism` at once (0: chosen here).
    If `data_dir` contains folders such as train and val, or train and test, the classes are below these. A `labels_file`
    names images and labels in place of the folders; see label_file.

    Raises:
      UserError: `data_dir` does not exist, has fewer than `min_classes` classes or a class without a readable image, or the
        fraction of bad files is above `max_bad_fraction`.
    """
    if pack := shards.open_pack(data_dir):
        if labels_file:
            raise UserError(
                f"--data_dir={data_dir} holds shards, which have their labels: leave out --labels={labels_file}."
            )
        return _from_pack(pack)
    if labels_file:
        listing = label_file.list_files(labels_file, data_dir, min_classes=min_classes)
    else:
        listing = list_files(data_dir, min_classes=min_classes)
    for note in listing.notes:
        logging.warning("%s: %s.", data_dir, note)
    paths, class_names = listing.paths, listing.class_names
    checks = file_checks.check_files(data_dir, listing, progress=progress, read_parallelism=read_parallelism)
    bad_files = [BadFile(path, check.reason) for path, check in zip(paths, checks, strict=True) if check.reason]
    if listing.lines:
        lines = dict(zip(paths, listing.lines, strict=True))
        bad_files = [
            bad._replace(reason=f"{bad.reason} (line {lines[bad.path]} of {labels_file})") for bad in bad_files
        ]
    bad_files += listing.bad_folders
    is_readable = np.array([not check.reason for check in checks], bool)
    examples = Examples(
        np.array(paths, object),
        np.array(listing.labels, np.int32),
        np.array([check.content_hash for check in checks], object),
        None if listing.groups is None else np.array(listing.groups, object),
    ).take(is_readable)
    _check_classes(data_dir, class_names, examples, bad_files)
    num_entries = len(paths) + len(listing.bad_folders)
    file_checks.check_bad_fraction(bad_files, num_entries, max_bad_fraction, data_dir=data_dir)
    return Folder(
        class_names=class_names,
        examples=examples,
        bad_files=tuple(bad_files),
        formats=frozenset(check.image_format for check in checks if not check.reason),
        split_folders=listing.split_folders,
        notes=listing.notes,
        labels_file=labels_file,
        sides=None if listing.sides is None else np.array(listing.sides, object)[is_readable],
    )


# Of the images of a class, the fraction whose bytes are also under another label, above which the layout of the folder is
# taken for wrong. A copy of a class folder, or of the whole set, below another one gives half of the images or all;
# mislabelled copies are a few percent in public data sets, and are reported, not refused.
MAX_SHARED_FRACTION = 0.1


def check_layout(data_dir: str, folder: Folder, *, accept_layout: bool) -> None:
    """Raises UserError for a layout that trains on the wrong thing; with `accept_layout` logs a warning instead.

    That is: a class is named like a part of a data set, or shares more than MAX_SHARED_FRACTION of its images with others.
    """
    problem = _layout_problem(folder)
    if not problem:
        return
    message = f"{data_dir}: {problem}"
    if not accept_layout:
        raise UserError(
            f"{message}: pass a folder with one sub-folder per class (or train/ and val/ with these), or --accept_layout if "
            "this is what you want."
        )
    logging.warning("%s (--accept_layout).", message)


def _layout_problem(folder: Folder) -> str:
    sides = [name for name in folder.class_names if side_of(name)]
    if sides:
        return (
            f"the classes {', '.join(map(repr, sides))} are named like parts of a data set, not like what images show"
        )
    examples = folder.examples
    _, content = np.unique(examples.hashes.astype(str), return_inverse=True)
    first_label = np.full(content.max() + 1, -1)
    first_label[content] = examples.labels
    differs = np.zeros(len(first_label), bool)
    differs[content[first_label[content] != examples.labels]] = True  # contents that have two labels or more
    is_shared = differs[content]
    if not is_shared.any():
        return ""
    counts = np.bincount(examples.labels, minlength=len(folder.class_names))
    shared = np.bincount(examples.labels[is_shared], minlength=len(folder.class_names))
    worst = int(np.argmax(shared / counts))
    path = examples.paths[np.flatnonzero(is_shared & (examples.labels == worst))[0]]
    found = f"{shared[worst]} of {counts[worst]} images of {folder.class_names[worst]!r} are also under another label"
    if shared[worst] > MAX_SHARED_FRACTION * counts[worst]:
        return f"{found} (the first: {path!r})"
    logging.warning("%s (the first: %r): run trainer.inspect_data.", found, path)
    return ""


def _from_pack(pack: shards.Pack) -> Folder:
    """The Folder that was packed."""
    examples = Examples(
        np.array([record.path for record in pack.records], object),
        np.array([record.label for record in pack.records], np.int32),
        np.array([record.content_hash for record in pack.records], object),
        _column([record.group for record in pack.records]),
    )
    manifest = pack.manifest
    split_folders = None
    if manifest["sides"]:
        training, validation, left_out, *test = manifest["sides"]
        split_folders = SplitFolders(training, validation, tuple(left_out), *test)
    return Folder(
        class_names=tuple(manifest["class_names"]),
        examples=examples,
        bad_files=tuple(BadFile(path, reason) for path, reason in manifest["bad_files"]),
        formats=frozenset(manifest["kinds"]),
        pack=pack,
        split_folders=split_folders,
        sides=_column([record.side for record in pack.records]),
    )


def _column(values: list[str]) -> np.ndarray | None:
    """The values as str objects [N], None if all are empty."""
    return np.array(values, object) if any(values) else None


def _check_classes(data_dir: str, class_names: tuple[str, ...], examples: Examples, bad_files: list[BadFile]) -> None:
    counts = np.bincount(examples.labels, minlength=len(class_names))
    if not counts.any():
        reasons = f" The first is {bad_files[0].path!r}: {bad_files[0].reason}." if bad_files else ""
        raise UserError(f"--data_dir={data_dir} holds no readable image in {len(class_names)} sub-folders.{reasons}")
    if not counts.all():
        empty = class_names[int(np.argmin(counts))]
        reasons = "".join(f" {b.path!r}: {b.reason}." for b in bad_files if b.path.startswith(empty + "/"))[:300]
        raise UserError(f"Class {empty!r} in {data_dir} holds no readable image: add some or remove it.{reasons}")
