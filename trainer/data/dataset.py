"""A folder of pictures, one sub-folder per class -> Examples, split into training and validation.

No TensorFlow: the folder is read, and its mistakes are told, before TensorFlow's four seconds of import.
Shapes: N examples, C classes.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from trainer.data import file_checks, listing, shards
from trainer.data.listing import BadFile, SplitFolders, printable
from trainer.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N pictures: path relative to the data directory, class index, MD5 of the content as hex."""

    paths: np.ndarray  # str objects [N]
    labels: np.ndarray  # int32 [N]
    hashes: np.ndarray  # str objects [N]

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at those positions (or where a boolean mask is true), in that order."""
        return Examples(self.paths[indices], self.labels[indices], self.hashes[indices])

    def __len__(self) -> int:
        return len(self.paths)


class Folder(NamedTuple):
    """What was found in a data directory: classes in sorted order, good examples in sorted order, bad files."""

    class_names: tuple[str, ...]
    examples: Examples
    bad_files: tuple[BadFile, ...]
    formats: frozenset[str] = frozenset()  # formats of the good examples, as formats.kind names them
    pack: shards.Pack | None = None  # where the pictures lie in shards
    split_folders: SplitFolders | None = None  # where the folder says itself what is held out


class Split(NamedTuple):
    """The two sides of the split; no content is on both sides within a class."""

    training: Examples
    validation: Examples


def read_folder(
    data_dir: str, *, max_bad_fraction: float = 1.0, progress: bool = False, read_parallelism: int = 0
) -> Folder:
    """Looks at every file below `data_dir`/CLASS/ once, in parallel: its hash, and whether it looks like a picture.

    A bucket lists the hashes, so of an object only the ends are read, `read_parallelism` at once (0: as many as suit).

    Where `data_dir` holds a folder train and a folder val (or training, valid, validation), the classes lie below these.
    Raises UserError where there is nothing to train on: no such folder, no sub-folders, one class, a class without a
    readable picture, or a share of bad files above `max_bad_fraction`.
    """
    if pack := shards.open_pack(data_dir):
        return _from_pack(pack)
    found = listing.list_files(data_dir)
    paths, class_names = found.paths, found.class_names
    checks = file_checks.check_files(data_dir, found, progress=progress, read_parallelism=read_parallelism)
    bad_files = [
        BadFile(printable(path), check.reason) for path, check in zip(paths, checks, strict=True) if check.reason
    ]
    bad_files += found.bad_folders
    examples = Examples(
        np.array(paths, object),
        np.array(found.labels, np.int32),
        np.array([check.content_hash for check in checks], object),
    ).take(np.array([not check.reason for check in checks], bool))
    _check_classes(data_dir, class_names, examples, bad_files)
    file_checks.check_bad_fraction(len(bad_files), len(paths) + len(found.bad_folders), bad_files[:1], max_bad_fraction)
    image_formats = frozenset(check.kind for check in checks if not check.reason)
    return Folder(class_names, examples, tuple(bad_files), image_formats, split_folders=found.split_folders)


def _from_pack(pack: shards.Pack) -> Folder:
    """What read_folder found when the pack was made."""
    examples = Examples(
        np.array([record.path for record in pack.records], object),
        shards.labels_of(pack),
        np.array([record.content_hash for record in pack.records], object),
    )
    manifest = pack.manifest
    split_folders = None
    if manifest["sides"]:
        training, validation, left_out = manifest["sides"]
        split_folders = SplitFolders(training, validation, tuple(left_out))
    bad_files = tuple(BadFile(*bad) for bad in manifest["bad_files"])
    return Folder(
        tuple(manifest["class_names"]), examples, bad_files, frozenset(manifest["kinds"]), pack, split_folders
    )


def _check_classes(data_dir: str, class_names: tuple[str, ...], examples: Examples, bad_files: list[BadFile]) -> None:
    counts = np.bincount(examples.labels, minlength=len(class_names))
    if not counts.any():
        reasons = f" The first is {bad_files[0].path!r}: {bad_files[0].reason}." if bad_files else ""
        raise UserError(f"--data_dir={data_dir} holds no readable picture in {len(class_names)} sub-folders.{reasons}")
    if not counts.all():
        empty = class_names[int(np.argmin(counts))]
        reasons = "".join(f" {b.path!r}: {b.reason}." for b in bad_files if b.path.startswith(empty + "/"))[:300]
        raise UserError(f"Class {empty!r} in {data_dir} holds no readable picture: add some or remove it.{reasons}")
