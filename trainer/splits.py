"""Which pictures are held out: by content, as the folder says itself, or as a split.csv says. No TensorFlow."""

import csv
import io

import numpy as np
from absl import logging

from trainer import examples, storage
from trainer.errors import UserError
from trainer.examples import Folder, Split
from trainer.listing import Sides


def choose(folder: Folder, *, validation_split: float, split_file: str) -> Split:
    """The split of `split_file` if there is one, else that of the folder's own train and val, else one by content."""
    if split_file:
        return _as_in_file(folder, split_file)
    if folder.sides:
        return _as_in_folders(folder, folder.sides)
    return examples.split(folder.examples, validation_split)


def origin(folder: Folder, *, validation_split: float, split_file: str) -> str:
    """Where the split comes from, in a line for log, plan and config.json."""
    if split_file:
        return f"as {split_file} says"
    if not folder.sides:
        return f"{validation_split:g} of each class held out, by content"
    left_out = "".join(f"; {name}/ is left out (see trainer.evaluate)" for name in folder.sides.left_out)
    return f"given by the folders {folder.sides.training}/ and {folder.sides.validation}/{left_out}"


def _as_in_folders(folder: Folder, named: Sides) -> Split:
    is_training = np.array([path.startswith(f"{named.training}/") for path in folder.examples.paths], bool)
    sides = Split(folder.examples.take(is_training), folder.examples.take(~is_training))
    shared = set(sides.training.hashes) & set(sides.validation.hashes)
    if shared:
        path = next(p for p, h in zip(sides.validation.paths, sides.validation.hashes, strict=True) if h in shared)
        logging.warning(
            "%d contents lie both in %s and in %s (the first: %r): the validation accuracy will be too good.",
            *(len(shared), named.training, named.validation, path),
        )
    return _checked(sides, folder, f"the folders {named.training}/ and {named.validation}/")


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
    return _checked(Split(*(folder.examples.take(mask) for mask in masks)), folder, f"--split_file={split_file}")


def _read_rows(split_file: str) -> dict[str, dict[str, str]]:
    """The rows of a split.csv by path. Raises UserError if it is none."""
    contents = storage.read(split_file)
    if contents is None:
        raise UserError(f"--split_file={split_file} does not exist: pass the split.csv of a run.")
    try:
        reader = csv.DictReader(io.StringIO(contents.decode(), newline=""))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--split_file={split_file} is no CSV ({error}): pass the split.csv of a run.") from None
    if tuple(reader.fieldnames or ()) != examples.SPLIT_COLUMNS:
        raise UserError(
            f"--split_file={split_file} begins with {','.join(reader.fieldnames or ())!r}, expected "
            f"{','.join(examples.SPLIT_COLUMNS)!r}: pass the split.csv of a run."
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


def _checked(sides: Split, folder: Folder, source: str) -> Split:
    for name, side in zip(Split._fields, sides, strict=True):
        if not len(side):
            raise UserError(f"{source} gives no picture of {folder.class_names} to {name}: add some, or split anew.")
    counts = np.bincount(sides.training.labels, minlength=len(folder.class_names))
    if not counts.all():
        empty = folder.class_names[int(np.argmin(counts))]
        raise UserError(f"{source} leaves the class {empty!r} without a training picture: add some, or take it out.")
    return sides
