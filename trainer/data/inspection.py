"""What a look at every picture of a folder tells: formats, sizes, duplicates, damage. No TensorFlow.

Shapes: N files, C classes.
"""

import collections
import io
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from trainer.data import file_checks, formats, listing, splits
from trainer.data.dataset import Examples
from trainer.storage import files

# Bits of 64 in which the perceptual hashes of the same picture differ after scaling and saving again. Eight, which is
# often advised, joins pictures that are only composed alike.
NEAR_DISTANCE = 4


SMALL_SIDE = 64  # pixels; less holds little that a network of 224 pixels could see


IMBALANCE_RATIO = 5  # of the largest to the smallest class


_HASHED_SIDE = 64  # pixels to which a JPEG is reduced in decoding; the hash looks at 32


_REMOTE_PROCESSES = 16  # a bucket answers slowly: more than there are cores


_ENDINGS = {
    **{".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".gif": "GIF", ".bmp": "BMP"},
    **{".webp": "WebP", ".tif": "TIFF", ".tiff": "TIFF", ".heic": "HEIC", ".heif": "HEIC", ".avif": "AVIF"},
}


class InspectedFile(NamedTuple):
    """One file as it was found; `reason` tells why it is no picture to train on (empty: it is one)."""

    path: str  # relative to the data directory
    class_name: str
    reason: str
    kind: str = ""
    num_bytes: int = 0
    width: int = 0
    height: int = 0
    content_hash: str = ""
    perceptual_hash: int | None = None  # 64 bits

    @property
    def small_side(self) -> int:
        """Pixels of the smaller side."""
        return min(self.width, self.height)


class Inspection(NamedTuple):
    """Everything that was found; groups are of two files or more, those across classes come in lists of their own."""

    class_names: tuple[str, ...]
    inspected: list[InspectedFile]
    same_label_duplicates: list[list[InspectedFile]]
    two_label_duplicates: list[list[InspectedFile]]
    near_duplicates: list[list[InspectedFile]]  # of different bytes, in one class
    two_label_near_duplicates: list[list[InspectedFile]]
    leaks: list[list[InspectedFile]]  # near-duplicates, one trained on and one validated with

    @property
    def bad(self) -> list[InspectedFile]:
        """Files that are no pictures to train on."""
        return [file for file in self.files if file.reason]

    @property
    def good(self) -> list[InspectedFile]:
        """The pictures."""
        return [file for file in self.files if not file.reason]

    @property
    def small(self) -> list[InspectedFile]:
        """Pictures of suspiciously few pixels."""
        return [file for file in self.good if file.small_side < SMALL_SIDE]

    @property
    def misnamed(self) -> list[InspectedFile]:
        """Pictures whose ending names another format; they are read all the same, by their content."""
        endings = {file.path: _ENDINGS.get(os.path.splitext(file.path)[1].lower()) for file in self.good}
        return [file for file in self.good if endings[file.path] not in (None, file.kind)]

    @property
    def class_counts(self) -> dict[str, int]:
        """Pictures of each class, in the order of class_names."""
        counts = collections.Counter(file.class_name for file in self.good)
        return {name: counts[name] for name in self.class_names}

    @property
    def is_unbalanced(self) -> bool:
        """Whether the largest class has more than UNBALANCED_RATIO times the pictures of the smallest."""
        counts = self.class_counts.values()
        return max(counts) > IMBALANCE_RATIO * min(counts)

    def to_remove(self) -> list[InspectedFile]:
        """Bad files, all but the first of equal pictures in a class, and all of those that carry two labels."""
        copies = [file for group in self.same_label_duplicates for file in group[1:]]
        contradictions = [file for group in self.two_label_duplicates for file in group]
        return sorted({*self.bad, *copies, *contradictions}, key=lambda file: file.path)


def inspect(data_dir: str, *, progress: bool = False, processes: int | None = None) -> Inspection:
    """Reads every file once, in parallel. Raises UserError if the folder cannot be listed or has not two classes."""
    found = listing.list_files(data_dir)
    names = [found.class_names[label] for label in found.labels]
    tasks = [(data_dir, path, name) for path, name in zip(found.paths, names, strict=True)]
    if files.is_remote(data_dir):
        processes = processes or _REMOTE_PROCESSES
    with ProcessPoolExecutor(processes) as pool:
        inspected = pool.map(inspect_file, tasks, chunksize=8)
        inspected = list(tqdm(inspected, "inspecting", len(tasks), unit="img", disable=not progress, leave=False))
    inspected += [InspectedFile(bad.path, bad.path.split("/")[0], bad.reason) for bad in found.bad_folders]
    good = [file for file in inspected if not file.reason]
    by_content = _groups((file.content_hash, file) for file in good)
    near = _near_duplicates(good)
    held_out = _validation_hashes(good)
    return Inspection(
        found.class_names,
        inspected,
        [group for group in by_content if not _has_two_labels(group)],
        [group for group in by_content if _has_two_labels(group)],
        [group for group in near if not _has_two_labels(group)],
        [group for group in near if _has_two_labels(group)],
        [group for group in near if len({file.content_hash in held_out for file in group}) == 2],
    )


def inspect_file(task: tuple[str, str, str]) -> InspectedFile:
    """Reads and decodes one file, given as (data directory, path in it, class)."""
    import imagehash
    from PIL import Image

    data_dir, path, class_name = task
    full_path = files.join(data_dir, path)
    is_remote = files.is_remote(full_path)
    contents = (files.read(full_path) or b"") if is_remote else b""
    check = file_checks.check_contents(contents) if is_remote else file_checks.check_file(full_path)
    file = InspectedFile(listing.printable(path), class_name, check.reason, check.kind, content_hash=check.content_hash)
    if not check.content_hash:
        return file
    contents = contents or files.read(full_path) or b""
    size = formats.header_size(contents) or formats.ImageSize(0, 0)
    file = file._replace(num_bytes=len(contents), width=size.width, height=size.height)
    if file.reason:
        return file
    Image.MAX_IMAGE_PIXELS = formats.MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on what it mends by itself
            image = Image.open(io.BytesIO(contents))
            image.draft("L", (_HASHED_SIDE, _HASHED_SIDE))
            bits = imagehash.phash(image.convert("RGB")).hash
    except Exception as error:  # decoders raise what they like on damaged data
        return file._replace(reason=f"cannot be decoded: {error}")
    return file._replace(perceptual_hash=int("".join("01"[bit] for bit in bits.ravel().astype(int)), 2))


def _groups(pairs: Iterable[tuple]) -> list[list[InspectedFile]]:
    """The files of equal key, where there are two or more, the largest group first."""
    groups = collections.defaultdict(list)
    for key, file in pairs:
        groups[key].append(file)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _has_two_labels(group: list[InspectedFile]) -> bool:
    return len({file.class_name for file in group}) > 1


def _near_duplicates(inspected: list[InspectedFile]) -> list[list[InspectedFile]]:
    """Groups of different contents whose hashes differ in NEAR_DISTANCE bits at most, directly or by way of others.

    Hashes that differ in d bits agree in one of d + 1 parts of them (the pigeonhole principle), so only pictures that
    share a part are compared. One file stands for each content.
    """
    distinct = list({file.content_hash: file for file in reversed(inspected)}.values())[::-1]
    hashes = np.array([file.perceptual_hash for file in distinct], np.uint64)
    parent = list(range(len(distinct)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    bits = 64 // (NEAR_DISTANCE + 1)
    for part in range(NEAR_DISTANCE + 1):
        keys = (hashes >> np.uint64(part * bits)) & np.uint64(2**bits - 1)
        order = np.argsort(keys, kind="stable")
        borders = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(order, borders):
            for position, i in enumerate(bucket[:-1]):
                others = bucket[position + 1 :]
                distance = np.bitwise_count(hashes[others] ^ hashes[i])
                for j in others[distance <= NEAR_DISTANCE]:
                    parent[root(int(j))] = root(int(i))
    return _groups((root(i), file) for i, file in enumerate(distinct))


def _validation_hashes(inspected: list[InspectedFile]) -> set[str]:
    """The contents that a job with default flags would hold out."""
    ids = {name: i for i, name in enumerate(sorted({file.class_name for file in inspected}))}
    everything = Examples(
        np.array([file.path for file in inspected], object),
        np.array([ids[file.class_name] for file in inspected], np.int32),
        np.array([file.content_hash for file in inspected], object),
    )
    try:
        return set(splits.split_by_content(everything, 0.2).validation.hashes)
    except ValueError:  # too few pictures to hold any out
        return set()


def summary(found: Inspection) -> dict:
    """Everything as values that JSON can hold."""

    def paths(groups: list[list[InspectedFile]]) -> list[list[str]]:
        return [[file.path for file in group] for group in groups]

    sides = [file.small_side for file in found.good]
    return {
        "files": len(found.files),
        "pictures": len(found.good),
        "classes": found.class_counts,
        "formats": dict(collections.Counter(file.kind for file in found.good).most_common()),
        "small_side": dict(
            zip(("min", "median", "max"), (min(sides), float(np.median(sides)), max(sides)), strict=True)
        )
        if sides
        else {},
        "bad_files": [{"path": file.path, "reason": file.reason} for file in found.bad],
        "misnamed": [{"path": file.path, "format": file.kind} for file in found.misnamed],
        "small": [{"path": file.path, "width": file.width, "height": file.height} for file in found.small],
        "is_unbalanced": found.is_unbalanced,
        "duplicates": paths(found.same_label_duplicates),
        "duplicates_under_two_labels": paths(found.two_label_duplicates),
        "near_duplicates": paths(found.near_duplicates),
        "near_duplicates_under_two_labels": paths(found.two_label_near_duplicates),
        "leaks": paths(found.leaks),
    }
