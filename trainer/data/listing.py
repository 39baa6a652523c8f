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

# Of files that accompany images, such as notes and annotations. They are no images, and no damaged ones either.
TEXT_EXTENSIONS = (".csv", ".htm", ".html", ".json", ".log", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")

# Words in the names of folders of a data directory that is split already; the other words of such a name are ignored.
TRAINING_WORDS = frozenset({"train", "training", "trainset"})
VALIDATION_WORDS = frozenset({"val", "valid", "validation", "dev", "valset"})
TEST_WORDS = frozenset({"test", "testing", "testset", "pred", "holdout"})
_NEUTRAL_WORDS = frozenset({"seg", "set", "data", "dataset", "images", "image", "img", "imgs", "split", "folder"})


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
    """The sub-folders of a data directory that is split already: paths relative to it, with slashes."""

    training: str
    validation: str  # empty: a part of the training images is held out
    left_out: tuple[str, ...]
    test: str = ""  # empty: no folder of test images in class folders


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The contents of a data directory; paths in sorted order within each class."""

    class_names: tuple[str, ...]
    paths: list[str]  # relative to the data directory, as escape_name writes them
    labels: list[int]  # class index of each path
    bad_folders: list[BadFile]  # folders that are named like an image
    split_folders: SplitFolders | None
    notes: tuple[str, ...]  # what of the directory is not used, and how it was recognized
    objects: "dict[str, gcs.ObjectInfo]"  # size and hash of each path in a bucket; empty for a local directory
    sides: list[str] | None = None  # of each path, as in Folder.sides; None without a label file that has them
    groups: list[str] | None = None  # of each path, as in Examples.groups; likewise
    lines: list[int] | None = None  # of each path in the label file


def list_files(data_dir: str, *, min_classes: int = 2) -> Listing:
    """Lists a data directory.

    Raises UserError if it cannot be listed, has fewer than `min_classes` classes, or has a class name that does not fit in
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
    split_folders, notes = _find_split_folders(scan, data_dir)
    class_names = _class_names(scan, data_dir, split_folders, min_classes)
    if not split_folders:
        notes += _unused_entries(scan, data_dir)
    sides = [""]
    if split_folders:
        named = (split_folders.training, split_folders.validation, split_folders.test)
        sides = [f"{side}/" for side in named if side]
    paths, labels, bad_folders, repeating, texts = [], [], [], set(), []
    for side in sides:
        found = [_files_below(scan, files.join(data_dir, side + name), side + name) for name in class_names]
        repeats = [_repeats_classes(side, i, class_names, found) for i in range(len(class_names))]
        repeating |= {name for name, is_repeat in zip(class_names, repeats, strict=True) if is_repeat}
        for label, (class_paths, named_like_images) in enumerate(found):
            reason = "a folder named like an image: its files are not read"
            bad_folders += [BadFile(escape_name(path), reason) for path in sorted(named_like_images)]
            images = sorted(escape_name(path) for path in class_paths if not path.lower().endswith(TEXT_EXTENSIONS))
            texts += sorted(escape_name(path) for path in class_paths if path.lower().endswith(TEXT_EXTENSIONS))
            paths += images
            labels += [label] * len(images)
    if repeating:
        names = tuple(name for name in class_names if name not in repeating)
        index = {class_names.index(name): i for i, name in enumerate(names)}
        kept = [(path, index[label]) for path, label in zip(paths, labels, strict=True) if label in index]
        paths, labels = [path for path, _ in kept], [label for _, label in kept]
        class_names = names
        notes += [
            f"the folder {name!r} repeats the class folders beside it and is not used" for name in sorted(repeating)
        ]
    if texts:
        notes.append(f"{len(texts)} text files beside the images are not used; the first is {texts[0]!r}")
    return Listing(
        class_names=class_names,
        paths=paths,
        labels=labels,
        bad_folders=bad_folders,
        split_folders=split_folders,
        notes=tuple(notes),
        objects={escape_name(name): info for name, info in objects.items()},
    )


def _repeats_classes(
    side: str, label: int, class_names: tuple[str, ...], found: list[tuple[list[str], list[str]]]
) -> bool:
    """Whether a class folder holds nothing but folders with the names of all other classes, as Kaggle's malaria set."""
    at = len(f"{side}{class_names[label]}/")
    below = {path[at:].split("/", 1)[0] for path in found[label][0] if "/" in path[at:]}
    has_images = any("/" not in path[at:] for path in found[label][0])
    others = set(class_names) - {class_names[label]}
    return len(others) >= 2 and not has_images and others <= below


def side_of(name: str) -> str:
    """training, validation or test, if the name of a folder says that it holds this part of a data set; else empty."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in _NEUTRAL_WORDS]
    sides = {"training": TRAINING_WORDS, "validation": VALIDATION_WORDS, "test": TEST_WORDS}
    return next((side for side, of_side in sides.items() if len(words) == 1 and words[0] in of_side), "")


def escape_name(path: str) -> str:
    """The name or path under which all outputs know a file: bytes that are not UTF-8, and CR, are written as \\xNN.

    Where a name itself contains such a sequence, its backslash is written as \\x5c, so that `unescape_name` restores every
    name. All other names are unchanged. Python represents the bytes as surrogates (PEP 383), which no text file can hold; CR
    ends a row of a CSV file.
    """
    escaped = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", path).replace("\r", r"\x0d")
    return os.fsencode(escaped).decode("utf-8", "backslashreplace")


def unescape_name(name: str) -> str:
    """The path of the file that `escape_name` gave that name; to be opened."""
    if "\\x" not in name:
        return name
    as_bytes = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), name.encode())
    return os.fsdecode(as_bytes)


def join(data_dir: str, name: str) -> str:
    """The path of a file in a data directory, given by the name in its Listing. A label file may name others by full path."""
    path = unescape_name(name)
    return path if files.is_remote(path) or os.path.isabs(path) else files.join(data_dir, path)


def _find_split_folders(scan: Scan, data_dir: str) -> tuple[SplitFolders | None, list[str]]:
    """The folders of the training, validation and test images, and notes.

    None unless there is one folder of training images, and one of validation images or some of test images. With any other
    folder beside them, these must hold class folders; the other folder, often a copy of them, is then left out. Test images
    that are not in class folders have no labels and are left out too, and so is more than one folder of labeled ones.
    """
    names = sorted(_folder_names(scan, data_dir)[0])
    training, validation, tests = (
        [name for name in names if side_of(name) == side] for side in ("training", "validation", "test")
    )
    others = [name for name in names if not side_of(name)]
    if len(training) != 1 or len(validation) > 1 or not (validation or tests):
        return None, []
    is_certain = validation and not others  # then a folder without classes is an error of this layout
    roots = {name: _class_root(scan, data_dir, name) for name in training + validation}
    if not is_certain and any(len(_folder_names(scan, files.join(data_dir, root))[0]) < 2 for root in roots.values()):
        return None, []  # classes of that name
    notes = [f"the folder {name!r} is neither for training nor for validation and is not used" for name in others]
    test_roots = {name: _class_root(scan, data_dir, name) for name in tests}
    classes = set(_folder_names(scan, files.join(data_dir, roots[training[0]]))[0])
    labeled = [
        name for name, root in test_roots.items() if classes & set(_folder_names(scan, files.join(data_dir, root))[0])
    ]
    test = labeled[0] if len(labeled) == 1 else ""
    roots |= {test: test_roots[test]} if test else {}
    notes += [f"the classes of {name!r} are in {root!r}" for name, root in roots.items() if root != name]
    return SplitFolders(
        roots[training[0]],
        roots[validation[0]] if validation else "",
        tuple(name for name in tests if name != test),
        roots[test] if test else "",
    ), notes


def _class_root(scan: Scan, data_dir: str, name: str) -> str:
    """The folder of the class folders: `name`, or the only folder in it, if that holds folders, as seg_train/seg_train."""
    directory = files.join(data_dir, name)
    folders, num_entries = _folder_names(scan, directory)
    if len(folders) == num_entries == 1 and len(_folder_names(scan, files.join(directory, folders[0]))[0]) >= 2:
        return f"{name}/{folders[0]}"
    return name


def _unused_entries(scan: Scan, data_dir: str) -> list[str]:
    """Notes on the files beside the class folders, and on folders that are not listed."""
    entries = scan(data_dir)
    loose = sorted(entry.name for entry in entries if not entry.is_folder and not is_ignored(entry.name))
    skipped = sorted(entry.name for entry in entries if entry.is_folder and is_ignored(entry.name))
    notes = [f"{len(loose)} files are in no class folder and are not used; the first is {loose[0]!r}"] if loose else []
    return notes + [f"the folder {name!r} is hidden or made by a file manager and is not used" for name in skipped]


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


def _class_names(scan: Scan, data_dir: str, split_folders: SplitFolders | None, min_classes: int) -> tuple[str, ...]:
    root = data_dir
    if split_folders:
        root = files.join(data_dir, split_folders.training)
    names, num_entries = _folder_names(scan, root)
    for side in (split_folders.validation, split_folders.test) if split_folders else ():
        side_dir = files.join(data_dir, side)
        untrained = sorted(set(_folder_names(scan, side_dir)[0]) - set(names)) if side else []
        if untrained:
            assert split_folders
            raise UserError(
                f"{side_dir} has the class {untrained[0]!r}, {split_folders.training} does not: add training images of "
                "the class, or remove it."
            )
    if not names:
        raise UserError(
            f"--data_dir={root} has no sub-folders ({num_entries} files): put the images of each class in a "
            "folder with the name of the class."
        )
    if len(names) < min_classes:
        inner = files.join(root, names[0])
        below = len(_folder_names(scan, inner)[0])
        hint = f" If its {below} sub-folders are the classes, pass --data_dir={inner}." if below > 1 else ""
        raise UserError(
            f"--data_dir={root} has only one class, {names[0]!r}, but a classifier needs two or more: add a folder "
            f"for each further class.{hint}"
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
