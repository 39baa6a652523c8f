"""Which pictures are held out: by content, as the folder says itself, or as a split.csv says. No TensorFlow."""

import csv
import hashlib
import io
from typing import TextIO

import numpy as np
from absl import logging

from trainer.data.dataset import Examples, Folder, Split
from trainer.data.listing import SplitFolders
from trainer.errors import UserError
from trainer.storage import files


def split_by_content(examples: Examples, validation_split: float) -> Split:
    """Holds out `validation_split` of each class by content: exact but for rounding and for groups of equal bytes.

    Within a class, files of equal bytes form a group; groups are ranked by their hash, and from the lowest on they are
    held out until the share is reached. So neither machine, path nor order of listing matters, and a file more or less
    moves at most one other group across the border. A class of two pictures or more gives at least one to validation,
    and its last group always stays in training; a class of one picture is trained on and not validated.
    """
    held_out = np.zeros(len(examples), bool)
    for label in np.unique(examples.labels):
        members = np.flatnonzero(examples.labels == label)
        members = members[np.argsort(examples.hashes[members], kind="stable")]
        hashes = examples.hashes[members]
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))  # where each group begins
        target = max(1, round(len(members) * validation_split))
        chosen = starts[:-1] < target
        end = np.append(starts, len(members))[np.count_nonzero(chosen)]
        held_out[members[:end]] = True
    if not held_out.any():
        raise UserError("No class has two different pictures, so none can be held out for validation: add pictures.")
    return Split(examples.take(~held_out), examples.take(held_out))


def fingerprint(split: Split, class_names: tuple[str, ...]) -> str:
    """A hash of classes, contents and split, the same wherever the folder lies: two runs with it see the same data."""
    digest = hashlib.sha256(repr(class_names).encode())
    for side in split:
        for label, content_hash in zip(side.labels.tolist(), side.hashes, strict=True):
            digest.update(f"{label} {content_hash}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()


SPLIT_COLUMNS = ("path", "label", "split", "content_hash")


def write_split(file: TextIO, split: Split, class_names: tuple[str, ...]) -> None:
    """Writes split.csv: path, label, split (training or validation), content_hash."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(SPLIT_COLUMNS)
    for name, side in zip(Split._fields, split, strict=True):
        for path, label, content_hash in zip(side.paths, side.labels, side.hashes, strict=True):
            writer.writerow((path, class_names[label], name, content_hash))


def choose(folder: Folder, *, validation_split: float, split_file: str) -> Split:
    """The split of `split_file` if there is one, else that of the folder's own train and val, else one by content."""
    if split_file:
        return _as_in_file(folder, split_file)
    if folder.split_folders:
        return _as_in_folders(folder, folder.split_folders)
    return split_by_content(folder.examples, validation_split)


def describe(folder: Folder, *, validation_split: float, split_file: str) -> str:
    """Where the split comes from, in a line for log, plan and config.json."""
    if split_file:
        return f"as {split_file} says"
    if not folder.split_folders:
        return f"{validation_split:g} of each class held out, by content"
    left_out = "".join(f"; {name}/ is left out (see trainer.evaluate)" for name in folder.split_folders.left_out)
    return f"given by the folders {folder.split_folders.training}/ and {folder.split_folders.validation}/{left_out}"


def _as_in_folders(folder: Folder, named: SplitFolders) -> Split:
    is_training = np.array([path.startswith(f"{named.training}/") for path in folder.examples.paths], bool)
    split = Split(folder.examples.take(is_training), folder.examples.take(~is_training))
    shared = set(split.training.hashes) & set(split.validation.hashes)
    if shared:
        path = next(p for p, h in zip(split.validation.paths, split.validation.hashes, strict=True) if h in shared)
        logging.warning(
            "%d contents lie both in %s and in %s (the first: %r): the validation accuracy will be too good.",
            *(len(shared), named.training, named.validation, path),
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
    for found, what in (
        (unlisted, "are not in it and are left out"),
        (missing, "are in it and are not in the folder, or are no readable pictures any more"),
        (changed, "have other contents than when it was written"),
    ):
        if found:
            logging.warning("--split_file=%s: %d pictures %s; the first: %r", split_file, len(found), what, found[0])
    masks = [np.array([name == side for name in names], bool) for side in Split._fields]
    return _check_split(Split(*(folder.examples.take(mask) for mask in masks)), folder, f"--split_file={split_file}")


def _read_rows(split_file: str) -> dict[str, dict[str, str]]:
    """The rows of a split.csv by path. Raises UserError if it is none."""
    contents = files.read(split_file)
    if contents is None:
        raise UserError(f"--split_file={split_file} does not exist: pass the split.csv of a run.")
    try:
        reader = csv.DictReader(io.StringIO(contents.decode(), newline=""))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--split_file={split_file} is no CSV ({error}): pass the split.csv of a run.") from None
    if tuple(reader.fieldnames or ()) != SPLIT_COLUMNS:
        raise UserError(
            f"--split_file={split_file} begins with {','.join(reader.fieldnames or ())!r}, expected "
            f"{','.join(SPLIT_COLUMNS)!r}: pass the split.csv of a run."
        )
    by_path = {}
    for number, row in enumerate(rows, 2):
        if row["split"] not in Split._fields:
            raise UserError(
                f"--split_file={split_file}, row {number}: split is {row['split']!r}, expected {' or '.join(Split._fields)}."
            )
        if row["path"] in by_path:
            raise UserError(f"--split_file={split_file}, row {number}: {row['path']!r} is there twice: remove one.")
        by_path[row["path"]] = row
    return by_path


def _check_split(split: Split, folder: Folder, source: str) -> Split:
    for name, side in zip(Split._fields, split, strict=True):
        if not len(side):
            raise UserError(f"{source} gives no picture of {folder.class_names} to {name}: add some, or split anew.")
    counts = np.bincount(split.training.labels, minlength=len(folder.class_names))
    if not counts.all():
        empty = folder.class_names[int(np.argmin(counts))]
        raise UserError(f"{source} leaves the class {empty!r} without a training picture: add some, or take it out.")
    return split
