"""Splits examples into training, validation and test: by content, by folders such as train and val, or by a split.csv.

No TensorFlow. Shapes: N examples.
"""

import collections
import csv
import dataclasses
import hashlib
import io
from typing import TextIO

import numpy as np
from absl import logging

from trainer.data import groups
from trainer.data.dataset import Examples, Folder, Split
from trainer.data.listing import SplitFolders
from trainer.errors import UserError
from trainer.storage import files


def split_by_content(examples: Examples, validation_split: float, group_names: np.ndarray | None = None) -> Split:
    """Holds out the fraction `validation_split` of each class, exact up to rounding and groups of equal content.

    A class with two different images or more has at least one in validation, and always one in training. With
    `group_names`, str objects [N], whole groups are held out (see groups.hold_out).

    Raises UserError if nothing can be held out.
    """
    is_validation = _held_out(examples, validation_split, group_names, keep=1)
    if not is_validation.any() and group_names is not None:
        raise UserError(
            "No class has images of two groups, so none can be held out for validation: add images, or pass another "
            "--group_by."
        )
    if not is_validation.any():
        raise UserError("No class has two different images, so none can be held out for validation: add images.")
    return Split(examples.take(~is_validation), examples.take(is_validation))


def _held_out(
    examples: Examples, fraction: float, group_names: np.ndarray | None, *, keep: int, from_end: bool = False
) -> np.ndarray:
    """Whether an example is held out, bool [N].

    Within a class, files of equal content form a group. Groups are sorted by their hash, and the first, or the last with
    `from_end`, are held out until the fraction is reached; `keep` groups of each class always stay. The result therefore
    depends neither on the machine nor on paths or their order, and adding or removing a file moves at most one other group
    across the border. With `group_names`, whole groups are held out (see groups.hold_out).
    """
    if group_names is not None:
        return groups.hold_out(examples, group_names, fraction)
    held_out = np.zeros(len(examples), bool)
    for label in np.unique(examples.labels):
        members = np.flatnonzero(examples.labels == label)
        members = members[np.argsort(examples.hashes[members], kind="stable")]
        members = members[::-1] if from_end else members
        hashes = examples.hashes[members]
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))  # first index of each group
        target = max(1, round(len(members) * fraction))
        chosen = starts[:-keep] < target
        end = np.append(starts, len(members))[np.count_nonzero(chosen)]
        held_out[members[:end]] = True
    return held_out


def fingerprint(split: Split, class_names: tuple[str, ...]) -> str:
    """A SHA-256 as hex of what a model is trained on: class names, contents and split, not the location of the folder.

    Test images are no part of it: they change nothing but their own result.
    """
    digest = hashlib.sha256(repr(class_names).encode())
    for side in (split.training, split.validation):
        for label, content_hash in zip(side.labels.tolist(), side.hashes, strict=True):
            digest.update(f"{label} {content_hash}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()


SPLIT_COLUMNS = ("path", "label", "split", "content_hash")


def write_split(file: TextIO, split: Split, class_names: tuple[str, ...]) -> None:
    """Writes split.csv: path, label, split (training, validation or test), content_hash."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(SPLIT_COLUMNS)
    for name, side in zip(Split._fields, split, strict=True):
        for path, label, content_hash in zip(side.paths, side.labels, side.hashes, strict=True):
            writer.writerow((path, class_names[label], name, content_hash))


def choose(
    folder: Folder, *, validation_split: float, split_file: str, test_split: float = 0.0, group_by: str = "none"
) -> Split:
    """The split of `split_file` if it is given, else of the folders train and val if they exist, else by content.

    Without a folder of test images, the fraction `test_split` of each class is the test set: by content, taken first and
    from the other end than validation, so that the rest is split as a folder without these images is. A class of three
    different images or more gives at least one. Groups, those of `group_by`, the value of --group_by, or of a label file,
    are held out whole, and are the `groups` of the result.

    Raises UserError if the file is not a split.csv, a class or side has no image, or `test_split` or `group_by` cannot apply.
    """
    if split_file:
        if folder.sides is not None:
            raise UserError(
                f"--split_file={split_file}, but the label file has a split column: leave out one of the two."
            )
        return _as_in_file(folder, split_file)
    folder = dataclasses.replace(folder, examples=_with_groups(folder, group_by))
    is_test = _is_test(folder, test_split)
    rest_sides = None if folder.sides is None else folder.sides[~is_test]
    rest = dataclasses.replace(folder, examples=folder.examples.take(~is_test), sides=rest_sides)
    if rest_sides is not None:
        split = _as_in_column(rest.examples, rest_sides, validation_split)
    elif folder.split_folders and folder.split_folders.validation:
        split = _as_in_folders(rest, folder.split_folders)
    else:
        split = split_by_content(rest.examples, validation_split, rest.examples.groups)
    split = split._replace(test=folder.examples.take(is_test))
    if len(split.test) or folder.sides is not None:
        _check_split(split, folder, "the split")
        _warn_of_shared_contents(split)
    return split


def _with_groups(folder: Folder, group_by: str) -> Examples:
    """The examples with the groups that `group_by` finds in their paths, or else with those of the label file."""
    named = folder.split_folders
    if group_by == "none":
        return folder.examples
    if named and named.validation:
        raise UserError(
            f"--group_by={group_by}, but the folders {named.training}/ and {named.validation}/ are the split: leave it out."
        )
    if folder.examples.groups is not None or folder.sides is not None:
        raise UserError(
            f"--group_by={group_by}, but the label file has a split or group column: leave out one of the two."
        )
    if group_by == "similar":  # features tell later what is similar
        return folder.examples
    return dataclasses.replace(folder.examples, groups=groups.names_in_paths(folder.examples.paths, group_by))


def _is_test(folder: Folder, test_split: float) -> np.ndarray:
    """Whether an example is a test image, bool [N]."""
    examples, test = folder.examples, folder.split_folders.test if folder.split_folders else ""
    if folder.sides is not None and "test" in folder.sides:
        if test_split:
            raise UserError(f"--test_split={test_split:g}, but the split column names test images: leave out the flag.")
        return folder.sides == "test"
    if test and test_split:
        raise UserError(f"--test_split={test_split:g}, but {test}/ holds the test images: leave out one of the two.")
    if test:
        is_test = np.array([path.startswith(f"{test}/") for path in examples.paths], bool)
        if not is_test.any():
            raise UserError(f"{test}/ holds no readable image: add test images, or remove the folder.")
        return is_test
    if not test_split:
        return np.zeros(len(examples), bool)
    is_test = _held_out(examples, test_split, examples.groups, keep=2, from_end=True)
    if not is_test.any():
        raise UserError(
            f"--test_split={test_split:g}, but no class has three different images, one each for training, validation and "
            "test: add images, or leave the flag out."
        )
    return is_test


def _as_in_column(examples: Examples, sides: np.ndarray, validation_split: float) -> Split:
    """The split of a label file, `sides` being those of the examples. Images without one are for training.

    Without any for validation, the fraction is held out by content: of the images without a side, else of all.
    """
    is_validation = sides == "validation"
    if not is_validation.any():
        is_open = sides == ""
        of = examples.take(is_open) if is_open.any() else examples
        held_out = set(split_by_content(of, validation_split, of.groups).validation.paths)
        is_validation = np.array([path in held_out for path in examples.paths], bool)
    return Split(examples.take(~is_validation), examples.take(is_validation))


def _warn_of_shared_contents(split: Split) -> None:
    seen = {*split.training.hashes, *split.validation.hashes}
    shared = [path for path, content in zip(split.test.paths, split.test.hashes, strict=True) if content in seen]
    if shared:
        logging.warning(
            "%d test images have the content of a training or validation image (the first: %r): the test accuracy will be "
            "too high.",
            len(shared),
            shared[0],
        )


def describe(
    folder: Folder, *, validation_split: float, split_file: str, test_split: float = 0.0, group_by: str = "none"
) -> str:
    """The origin of the split, as one line for the log, the plan and config.json."""
    if split_file:
        return f"from {split_file}"
    what = {"none": "", "similar": " and with look-alikes on one side"}
    grouped = what.get(group_by, f", in whole groups (--group_by={group_by})")
    grouped = grouped if folder.examples.groups is None else ", in whole groups (of the label file)"
    by_content = f"{validation_split:g} of each class held out, by content{grouped}"
    for_test = f"{test_split:g} of each class held out first as test images, by content{grouped}"
    if folder.sides is not None:
        origin = f"from the split column of {folder.labels_file or 'the packed label file'}"
        first = f"; {for_test}" if test_split else ""
        has_validation = "validation" in folder.sides
        return origin + first + ("" if has_validation else f"; {by_content}")
    if not folder.split_folders:
        return f"{for_test}; then {by_content}" if test_split else by_content
    named = folder.split_folders
    origin = f"from the folder {named.training}/, {by_content}"
    if named.validation:
        origin = f"from the folders {named.training}/ and {named.validation}/"
    if test_split:
        origin += f"; {for_test}"
    if named.test:
        origin += f"; test images from {named.test}/"
    return origin + "".join(f"; {name}/ is left out (see trainer.evaluate)" for name in named.left_out)


def describe_changes(split_file: str, split: Split, class_names: tuple[str, ...]) -> str:
    """What differs from the split.csv of an earlier run: classes and images that were added, and those that are gone.

    An image is known by its label and its content, so a file that was only renamed does not count.
    """
    rows = _read_rows(split_file)
    earlier = collections.Counter((row["label"], row["content_hash"]) for row in rows.values())
    now: collections.Counter[tuple[str, str]] = collections.Counter()
    added = []
    for side in split:
        for path, label, content_hash in zip(side.paths, side.labels, side.hashes, strict=True):
            image = (class_names[label], content_hash)
            now[image] += 1
            if now[image] > earlier[image]:
                added.append(path)
    gone = []
    for path, row in rows.items():
        image = (row["label"], row["content_hash"])
        now[image] -= 1
        if now[image] < 0:
            gone.append(path)
    earlier_names = {row["label"] for row in rows.values()}
    changes = [f"the class {name!r} is new" for name in class_names if name not in earlier_names]
    changes += [f"the class {name!r} is gone" for name in sorted(earlier_names - set(class_names))]
    changes += [
        f"{len(paths)} images {what}, the first is {sorted(paths)[0]!r}"
        for what, paths in (("are new", added), ("are gone or changed", gone))
        if paths
    ]
    return "; ".join(changes) or "the same images are split otherwise"


def _as_in_folders(folder: Folder, named: SplitFolders) -> Split:
    is_training = np.array([path.startswith(f"{named.training}/") for path in folder.examples.paths], bool)
    split = Split(folder.examples.take(is_training), folder.examples.take(~is_training))
    shared = set(split.training.hashes) & set(split.validation.hashes)
    if shared:
        path = next(p for p, h in zip(split.validation.paths, split.validation.hashes, strict=True) if h in shared)
        logging.warning(
            "%d contents are both in %s and in %s (the first: %r): the validation accuracy will be too high.",
            len(shared),
            named.training,
            named.validation,
            path,
        )
    return _check_split(split, folder, f"the folders {named.training}/ and {named.validation}/")


def _as_in_file(folder: Folder, split_file: str) -> Split:
    rows = _read_rows(split_file)
    paths = folder.examples.paths
    names = [rows[path]["split"] if path in rows else "" for path in paths]
    changed = [
        path
        for path, content_hash in zip(paths, folder.examples.hashes, strict=True)
        if path in rows and rows[path]["content_hash"] != content_hash
    ]
    unlisted = [path for path, name in zip(paths, names, strict=True) if not name]
    missing = sorted(set(rows) - set(paths))
    for affected, problem in (
        (unlisted, "are not in it and are left out"),
        (missing, "are in it, but no longer in the folder, or no longer readable"),
        (changed, "have changed since it was written"),
    ):
        if affected:
            logging.warning(
                "--split_file=%s: %d images %s; the first: %r", split_file, len(affected), problem, affected[0]
            )
    split = Split(*(folder.examples.take(np.array([name == side for name in names], bool)) for side in Split._fields))
    _warn_of_shared_contents(split)
    return _check_split(split, folder, f"--split_file={split_file}")


def _read_rows(split_file: str) -> dict[str, dict[str, str]]:
    """The rows of a split.csv by path. Raises UserError if the file is not one."""
    contents = files.read(split_file)
    if contents is None:
        raise UserError(f"--split_file={split_file} does not exist: pass the split.csv of a run.")
    try:
        reader = csv.DictReader(io.StringIO(contents.decode(), newline=""))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--split_file={split_file} is not CSV ({error}): pass the split.csv of a run.") from None
    if tuple(reader.fieldnames or ()) != SPLIT_COLUMNS:
        raise UserError(
            f"--split_file={split_file} begins with {','.join(reader.fieldnames or ())!r}, expected "
            f"{','.join(SPLIT_COLUMNS)!r}: pass the split.csv of a run."
        )
    by_path = {}
    for number, row in enumerate(rows, 2):
        if row["split"] not in Split._fields:
            raise UserError(
                f"--split_file={split_file}, row {number}: split is {row['split']!r}, expected "
                "training, validation or test."
            )
        if row["path"] in by_path:
            raise UserError(f"--split_file={split_file}, row {number}: {row['path']!r} is listed twice: remove one.")
        by_path[row["path"]] = row
    return by_path


def _check_split(split: Split, folder: Folder, source: str) -> Split:
    for name, side in (("training", split.training), ("validation", split.validation)):
        if not len(side):
            raise UserError(
                f"{source} has no image of {folder.class_names} for {name}: add some, or make another split."
            )
    counts = np.bincount(split.training.labels, minlength=len(folder.class_names))
    if not counts.all():
        empty = folder.class_names[int(np.argmin(counts))]
        raise UserError(f"{source} leaves the class {empty!r} without a training image: add some, or remove the class.")
    return split
