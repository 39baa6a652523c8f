"""What lies in a data directory, local or gs://, before any file is read: classes, paths, sides. No TensorFlow."""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.errors import UserError
from trainer.storage import files

if TYPE_CHECKING:
    from trainer.storage import gcs


# Left behind by file managers; compared in lower case.
IGNORED_NAMES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r"})


IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


# Folders of a data directory that is split already; compared in lower case.
TRAINING_FOLDERS = ("train", "training")


VALIDATION_FOLDERS = ("val", "valid", "validation")


TEST_FOLDERS = ("test", "testing")


class BadFile(NamedTuple):
    """A file that is not a picture to train on, and why."""

    path: str
    reason: str


class Entry(NamedTuple):
    """A name in a folder."""

    name: str
    is_folder: bool


Scan = Callable[[str], list[Entry]]  # of a directory; raises OSError


class SplitFolders(NamedTuple):
    """The sub-folders of a data directory that is split already, as they are called there."""

    training: str
    validation: str
    left_out: tuple[str, ...]


class Listing(NamedTuple):
    """What lies in a data directory, before any file is read; paths in sorted order within each class.

    Of a bucket, `objects` has what it tells of each path: size and hash.
    """

    class_names: tuple[str, ...]
    paths: list[str]  # relative to the data directory
    labels: list[int]
    bad_folders: list[BadFile]
    split_folders: SplitFolders | None
    objects: "dict[str, gcs.ObjectInfo]"


def list_files(data_dir: str) -> Listing:
    """Lists a data directory. Raises UserError if it has not two classes, or classes that labels.txt cannot hold."""
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
            found, named_like_images = _files_below(scan, f"{data_dir}/{side}{class_name}", side + class_name)
            reason = "a folder named like a picture: its files are not read"
            bad_folders += [BadFile(printable(path), reason) for path in sorted(named_like_images)]
            paths += sorted(found)
            labels += [label] * len(found)
    return Listing(class_names, paths, labels, bad_folders, split_folders, objects)


def printable(path: str) -> str:
    """The path as UTF-8 can write it: bytes of a name that are no UTF-8 become \\xNN."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _find_split_folders(scan: Scan, data_dir: str) -> SplitFolders | None:
    """The folders train and val of a data directory (or training, valid, validation), None if it has not both."""
    names = {name.lower(): name for name in sorted(_folder_names(scan, data_dir)[0])}
    training = [names[name] for name in TRAINING_FOLDERS if name in names]
    validation = [names[name] for name in VALIDATION_FOLDERS if name in names]
    tests = [names[name] for name in TEST_FOLDERS if name in names]
    if len(training) != 1 or len(validation) != 1 or len(names) != 2 + len(tests):
        return None  # with any other folder beside them they are classes that happen to be called so
    return SplitFolders(training[0], validation[0], tuple(tests))


def _folder_names(scan: Scan, data_dir: str) -> tuple[list[str], int]:
    """The names of the sub-folders that count, and how many entries there are in all. Raises UserError without a folder."""
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
        names, validated = (sorted(_folder_names(scan, f"{data_dir}/{side}")[0]) for side in split_folders[:2])
        unknown = sorted(set(validated) - set(names))
        if unknown:
            raise UserError(
                f"{data_dir}/{split_folders.validation} has the class {unknown[0]!r}, {split_folders.training} has not: add pictures to "
                "train it on, or take it out."
            )
        num_entries = len(names)
    else:
        names, num_entries = _folder_names(scan, data_dir)
    if not names:
        raise UserError(
            f"--data_dir={data_dir} has no sub-folders ({num_entries} files): put the pictures of each class in a "
            "folder of its own, named as the class."
        )
    if len(names) == 1:
        raise UserError(
            f"--data_dir={data_dir} has one class only, {names[0]!r}: there is nothing to tell apart; add a folder "
            "for each further class."
        )
    for name in names:
        if "\n" in name or "\r" in name or printable(name) != name:
            raise UserError(
                f"The class {name!r} in {data_dir} cannot stand as one line of UTF-8 in labels.txt: rename the folder "
                "without line ends, in UTF-8."
            )
    return tuple(sorted(names))


def list_files_below(path: str) -> list[str] | None:
    """A file's own path, or those of all files below a folder, in order; None if there is neither."""
    if not files.is_remote(path):
        if not os.path.isdir(path):
            return [path] if os.path.exists(path) else None
        found = []
        for directory, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not is_ignored(name))
            found += [os.path.join(directory, name) for name in sorted(names) if not is_ignored(name)]
        return found
    from trainer.storage import gcs

    objects = gcs.list_tree(path)
    if not objects:
        return [path] if gcs.stat(path) else None
    is_shown = {name: name[-1] != "/" and not any(map(is_ignored, name.split("/"))) for name in objects}
    return [files.join(path, name) for name in objects if is_shown[name]]


def _files_below(scan: Scan, directory: str, relative: str) -> tuple[list[str], list[str]]:
    """Paths of all files at any depth, and of folders named like pictures, which are not entered.

    Links are followed; a directory that is its own ancestor is entered once. No such directory: no files.
    """
    found, named_like_images, seen, waiting = [], [], set(), [(directory, relative)]
    while waiting:
        directory, relative = waiting.pop()
        identity = directory if files.is_remote(directory) else os.path.realpath(directory)
        if identity in seen:
            continue
        seen.add(identity)
        try:
            entries = scan(directory)
        except FileNotFoundError:  # a class that has no folder on one side of a given split
            continue
        except OSError as error:
            raise UserError(f"{directory} cannot be listed: {error.strerror}. Grant reading or move it away.") from None
        for entry in entries:
            path = f"{relative}/{entry.name}"
            if is_ignored(entry.name):
                continue
            if not entry.is_folder:
                found.append(path)
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                named_like_images.append(path)
            else:
                waiting.append((f"{directory}/{entry.name}", path))
    return found, named_like_images


def _scan_disk(directory: str) -> list[Entry]:
    with os.scandir(directory) as entries:
        return [Entry(entry.name, _is_folder(entry)) for entry in entries]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself; what reads it will say so
        return False


def _scan_names(root: str, names: Iterable[str]) -> Scan:
    """As _scan_disk, of the folders that the slashes in the names of objects make. Placeholders are folders."""
    folders: dict[str, set[Entry]] = {}
    for name in names:
        *parents, last = name.split("/")
        directory = root
        for parent in parents:
            folders.setdefault(directory, set()).add(Entry(parent, True))
            directory = f"{directory}/{parent}"
        entries = folders.setdefault(directory, set())
        if last:
            entries.add(Entry(last, False))

    def scan(directory: str) -> list[Entry]:
        if directory not in folders:
            raise FileNotFoundError(directory)
        return list(folders[directory])

    return scan


def is_ignored(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or left behind by a file manager."""
    return name.startswith(".") or name.lower() in IGNORED_NAMES
