"""Lists a data directory, local or gs://, without reading the files: classes, paths, folders of a split.

No TensorFlow.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.errors import UserError
from trainer.storage import files

if TYPE_CHECKING:
    from trainer.storage import gcs

# Created by file managers; compared in lower case.
IGNORED_NAMES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r"})

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

# Folders of a data directory that is split already; compared in lower case.
TRAINING_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation")
TEST_FOLDERS = ("test", "testing")


class BadFile(NamedTuple):
    """A file that cannot be used, and the reason."""

    path: str
    reason: str


class Entry(NamedTuple):
    """A file or folder in a directory."""

    name: str
    is_folder: bool


Scan = Callable[[str], list[Entry]]  # lists a directory; raises OSError


class SplitFolders(NamedTuple):
    """The names of the sub-folders of a data directory that is split already."""

    training: str
    validation: str
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The contents of a data directory; paths in sorted order within each class."""

    class_names: tuple[str, ...]
    paths: list[str]  # relative to the data directory, as escape_name writes them
    labels: list[int]  # class index of each path
    bad_folders: list[BadFile]  # folders that are named like an image
    split_folders: SplitFolders | None
    objects: "dict[str, gcs.ObjectInfo]"  # size and hash of each path in a bucket; empty for a local directory


def list_files(data_dir: str) -> Listing:
    """Lists a data directory.

    Raises UserError if it cannot be listed, has fewer than two classes, or has a class name that does not fit in
    labels.txt.
    """
    data_dir = data_dir.rstrip("/") or "/"
    objects: dict[str, Any] = {}
    scan: Scan = _scan_disk
    if files.is_remote(data_dir):
        from trainer.storage import gcs

        try:
            objects = gcs.list_tree(data_dir)
        except FileNotFoundError as error:
            raise UserError(f"--data_dir={data_dir}: {error.strerror}.") from None
        scan = _scan_names(data_dir, objects)
    split_folders = _find_split_folders(scan, data_dir)
    class_names = _class_names(scan, data_dir, split_folders)
    paths, labels, bad_folders = [], [], []
    for side in [f"{split_folders.training}/", f"{split_folders.validation}/"] if split_folders else [""]:
        for label, class_name in enumerate(class_names):
            directory = files.join(data_dir, side + class_name)
            class_paths, named_like_images = _files_below(scan, directory, side + class_name)
            reason = "a folder named like an image: its files are not read"
            bad_folders += [BadFile(escape_name(path), reason) for path in sorted(named_like_images)]
            paths += sorted(escape_name(path) for path in class_paths)
            labels += [label] * len(class_paths)
    return Listing(
        class_names=class_names,
        paths=paths,
        labels=labels,
        bad_folders=bad_folders,
        split_folders=split_folders,
        objects={escape_name(name): info for name, info in objects.items()},
    )


def escape_name(path: str) -> str:
    """The name or path under which all outputs know a file: bytes that are not UTF-8 are written as \\xNN.

    Where a name itself contains such a sequence, its backslash is written as \\x5c, so that `unescape_name` restores every
    name. All other names are unchanged. Python represents the bytes as surrogates (PEP 383), which no text file can hold.
    """
    escaped = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", path)
    return os.fsencode(escaped).decode("utf-8", "backslashreplace")


def unescape_name(name: str) -> str:
    """The path of the file that `escape_name` gave that name; to be opened."""
    if "\\x" not in name:
        return name
    as_bytes = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), name.encode())
    return os.fsdecode(as_bytes)


def join(data_dir: str, name: str) -> str:
    """The path of a file in a data directory, given by the name in its Listing."""
    return files.join(data_dir, unescape_name(name))


def _find_split_folders(scan: Scan, data_dir: str) -> SplitFolders | None:
    """The folders train and val of a data directory (or training, valid, validation); None unless it has both."""
    names = {name.lower(): name for name in sorted(_folder_names(scan, data_dir)[0])}
    training = [names[name] for name in TRAINING_FOLDERS if name in names]
    validation = [names[name] for name in VALIDATION_FOLDERS if name in names]
    tests = [names[name] for name in TEST_FOLDERS if name in names]
    if len(training) != 1 or len(validation) != 1 or len(names) != 2 + len(tests):
        return None  # with any other folder beside them, they are classes of that name
    return SplitFolders(training[0], validation[0], tuple(tests))


def _folder_names(scan: Scan, data_dir: str) -> tuple[list[str], int]:
    """The names of the sub-folders and the number of entries, without ignored names. Raises UserError if it fails."""
    try:
        entries = [entry for entry in scan(data_dir) if not is_ignored(entry.name)]
    except FileNotFoundError:
        raise UserError(f"--data_dir={data_dir} does not exist: pass a folder with one sub-folder per class.") from None
    except NotADirectoryError:
        raise UserError(f"--data_dir={data_dir} is a file: pass a folder with one sub-folder per class.") from None
    except OSError as error:
        raise UserError(f"--data_dir={data_dir} cannot be listed: {error.strerror}.") from None
    return [entry.name for entry in entries if entry.is_folder], len(entries)


def _class_names(scan: Scan, data_dir: str, split_folders: SplitFolders | None) -> tuple[str, ...]:
    if split_folders:
        names = sorted(_folder_names(scan, files.join(data_dir, split_folders.training))[0])
        validation_dir = files.join(data_dir, split_folders.validation)
        untrained = sorted(set(_folder_names(scan, validation_dir)[0]) - set(names))
        if untrained:
            raise UserError(
                f"{validation_dir} has the class {untrained[0]!r}, {split_folders.training} does not: add training "
                "images of the class, or remove it."
            )
        num_entries = len(names)
    else:
        names, num_entries = _folder_names(scan, data_dir)
    if not names:
        raise UserError(
            f"--data_dir={data_dir} has no sub-folders ({num_entries} files): put the images of each class in a "
            "folder with the name of the class."
        )
    if len(names) == 1:
        raise UserError(
            f"--data_dir={data_dir} has only one class, {names[0]!r}, but a classifier needs two or more: add a folder "
            "for each further class."
        )
    for name in names:
        if "\n" in name or "\r" in name or not _is_utf8(name):
            raise UserError(
                f"The class {name!r} in {data_dir} cannot be written as one line of UTF-8 in labels.txt: rename the "
                "folder, in UTF-8 and without line breaks."
            )
    return tuple(sorted(names))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # has surrogates
        return False
    return True


def list_files_below(path: str) -> list[str] | None:
    """The paths of all files below a folder, sorted; of a file its own path; None if `path` does not exist."""
    if not files.is_remote(path):
        if not os.path.isdir(path):
            return [path] if os.path.exists(path) else None
        paths = []
        for directory, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not is_ignored(name))
            paths += [files.join(directory, name) for name in sorted(names) if not is_ignored(name)]
        return paths
    from trainer.storage import gcs

    objects = gcs.list_tree(path)
    if not objects:
        return [path] if gcs.stat(path) else None
    return [
        files.join(path, name)
        for name in objects
        if not name.endswith("/") and not any(is_ignored(part) for part in name.split("/"))
    ]


def _files_below(scan: Scan, directory: str, relative: str) -> tuple[list[str], list[str]]:
    """The paths of all files at any depth, and of the folders that are named like an image, which are not listed.

    Follows links; a directory that is its own ancestor is listed once. A missing directory has no files.
    """
    paths, named_like_images, seen, pending = [], [], set(), [(directory, relative)]
    while pending:
        directory, relative = pending.pop()
        identity = directory if files.is_remote(directory) else os.path.realpath(directory)
        if identity in seen:
            continue
        seen.add(identity)
        try:
            entries = scan(directory)
        except FileNotFoundError:  # a class without a folder on one side of the split
            continue
        except OSError as error:
            raise UserError(f"{directory} cannot be listed: {error.strerror}. Grant read access or move it.") from None
        for entry in entries:
            path = f"{relative}/{entry.name}"
            if is_ignored(entry.name):
                continue
            if not entry.is_folder:
                paths.append(path)
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                named_like_images.append(path)
            else:
                pending.append((files.join(directory, entry.name), path))
    return paths, named_like_images


def _scan_disk(directory: str) -> list[Entry]:
    with os.scandir(directory) as entries:
        return [Entry(entry.name, _is_folder(entry)) for entry in entries]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; reading it reports the error
        return False


def _scan_names(root: str, names: Iterable[str]) -> Scan:
    """As _scan_disk, for object names: slashes make folders, and a name that ends in a slash is a folder."""
    folders: dict[str, set[Entry]] = {}
    for name in names:
        *parents, last = name.split("/")
        directory = root
        for parent in parents:
            folders.setdefault(directory, set()).add(Entry(parent, True))
            directory = files.join(directory, parent)
        entries = folders.setdefault(directory, set())
        if last:
            entries.add(Entry(last, False))

    def scan(directory: str) -> list[Entry]:
        if directory not in folders:
            raise FileNotFoundError(directory)
        return list(folders[directory])

    return scan


def is_ignored(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or created by a file manager."""
    return name.startswith(".") or name.lower() in IGNORED_NAMES
