"""Inspects every image of a folder: format, size, damage, exact and near duplicates.

Decodes as training does, so that both reject the same files; imports TensorFlow when the first image is decoded.

Shapes: N distinct images.
"""

import collections
import dataclasses
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from trainer import cli
from trainer.data import file_checks, formats, label_file, listing, splits
from trainer.data.dataset import Examples
from trainer.errors import UserError
from trainer.storage import files

# Of 64 bits, the number in which the perceptual hashes of an image may differ after resizing and saving again. Eight,
# which is often recommended, joins different images of similar composition.
NEAR_DISTANCE = 4

SMALL_SIDE = 64  # pixels; smaller images have little detail for a network with an input of 224 pixels

IMBALANCE_RATIO = 5  # of the largest to the smallest class

_DECODED_SIDE = 64  # pixels to which an image is resized; the hash uses 32

_REMOTE_THREADS = 16  # more than there are cores, because a bucket responds slowly

# A file without any of these has no orientation.
_ORIENTATION_MARKS = (b"Exif\0\0", b"eXIf", b"EXIF", b"Raw profile type exif", b"tiff:Orientation")

_FORMAT_OF_EXTENSION = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".webp": "WebP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".avif": "AVIF",
}


@dataclasses.dataclass(frozen=True)
class InspectedFile:
    """The result for one file."""

    path: str  # relative to the data directory
    class_name: str
    reason: str  # why the file cannot be used; empty if it can
    image_format: str = ""  # as in formats.detect_format
    num_bytes: int = 0
    width: int = 0  # pixels
    height: int = 0
    content_hash: str = ""  # MD5 as hex
    perceptual_hash: int | None = None  # 64 bits
    ignored_orientation: int = 1  # that Pillow applies and the trainer does not; 1: both agree

    @property
    def small_side(self) -> int:
        """Pixels of the smaller side."""
        return min(self.width, self.height)


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """The results for a folder. A group has two files or more."""

    class_names: tuple[str, ...]
    notes: tuple[str, ...]  # of listing.Listing
    inspected: list[InspectedFile]
    same_label_duplicates: list[list[InspectedFile]]
    two_label_duplicates: list[list[InspectedFile]]
    near_duplicates: list[list[InspectedFile]]  # of different bytes, in one class
    two_label_near_duplicates: list[list[InspectedFile]]
    leaks: list[list[InspectedFile]]  # near-duplicates on both sides of the split

    @property
    def bad(self) -> list[InspectedFile]:
        """Files that cannot be used."""
        return [file for file in self.inspected if file.reason]

    @property
    def good(self) -> list[InspectedFile]:
        """Readable images."""
        return [file for file in self.inspected if not file.reason]

    @property
    def small(self) -> list[InspectedFile]:
        """Images with a side below SMALL_SIDE."""
        return [file for file in self.good if file.small_side < SMALL_SIDE]

    @property
    def ignored_orientations(self) -> list[InspectedFile]:
        """Images that other programs rotate or flip, and the trainer does not."""
        return [file for file in self.good if file.ignored_orientation != 1]

    @property
    def misnamed(self) -> list[InspectedFile]:
        """Images whose extension is that of another format. They can be used: the content decides the format."""
        named = {file.path: _FORMAT_OF_EXTENSION.get(os.path.splitext(file.path)[1].lower()) for file in self.good}
        return [file for file in self.good if named[file.path] not in (None, file.image_format)]

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of images of each class, in the order of class_names."""
        counts = collections.Counter(file.class_name for file in self.good)
        return {name: counts[name] for name in self.class_names}

    @property
    def is_unbalanced(self) -> bool:
        """Whether the largest class has more than IMBALANCE_RATIO times the images of the smallest."""
        counts = self.class_counts.values()
        return max(counts) > IMBALANCE_RATIO * min(counts)

    def to_remove(self) -> list[InspectedFile]:
        """Bad files, and all but the first of equal files: the first one is kept, whatever its label."""
        copies = [file for group in self.same_label_duplicates + self.two_label_duplicates for file in group[1:]]
        return sorted({*self.bad, *copies}, key=lambda file: file.path)


def inspect(data_dir: str, *, progress: bool = False, threads: int | None = None, labels_file: str = "") -> Inspection:
    """Reads and decodes every file once, in parallel `threads` (None: one per core; for a bucket 16).

    With a `labels_file`, these are the images that it names, and its bad rows are bad files; see label_file.

    Raises UserError if the folder cannot be listed or has fewer than two classes.
    """
    listed = label_file.list_files(labels_file, data_dir) if labels_file else listing.list_files(data_dir)
    names = [listed.class_names[label] for label in listed.labels]
    threads = threads or (_REMOTE_THREADS if files.is_remote(data_dir) else os.cpu_count())
    decode = _decoder()
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(functools.partial(_inspect_file, decode, data_dir), listed.paths, names)
        inspected = list(tqdm(results, "inspecting", len(names), unit="img", disable=not progress, leave=False))
    inspected += [InspectedFile(bad.path, bad.path.split("/")[0], bad.reason) for bad in listed.bad_folders]
    good = [file for file in inspected if not file.reason]
    by_content = _groups((file.content_hash, file) for file in good)
    near = _near_duplicates(good)
    validation = _validation_hashes(good)
    return Inspection(
        class_names=listed.class_names,
        notes=listed.notes,
        inspected=inspected,
        same_label_duplicates=[group for group in by_content if not _has_two_labels(group)],
        two_label_duplicates=[group for group in by_content if _has_two_labels(group)],
        near_duplicates=[group for group in near if not _has_two_labels(group)],
        two_label_near_duplicates=[group for group in near if _has_two_labels(group)],
        leaks=[group for group in near if len({file.content_hash in validation for file in group}) == 2],
    )


# uint8 [_DECODED_SIDE, _DECODED_SIDE, 3] and the orientation that was applied, from the bytes of a file and whether they
# are a JPEG; raises one of decoders.DECODE_ERRORS.
Decode = Callable[[bytes, bool], tuple[np.ndarray, int]]


def _decoder() -> Decode:
    cli.import_tensorflow()  # after the listing, which reports its errors at once
    import tensorflow as tf

    from trainer.data import decoders, preprocessing

    network_input = preprocessing.NetworkInput(_DECODED_SIDE, "stretch", "rescale")

    def square(decoded: decoders.Decoded) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = tf.ensure_shape(decoded.pixels, [None, None, 3])
        resized = preprocessing.resize(pixels, network_input, is_reduced=decoded.is_reduced)
        return decoders.apply_orientation(resized, decoded.orientation), decoded.orientation

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def decode_jpeg(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return square(decoders.decode_jpeg(contents, _DECODED_SIDE, by_longer_side=False))

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def decode_any(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return square(decoders.decode(contents, _DECODED_SIDE, by_longer_side=False))

    def decode(contents: bytes, is_jpeg: bool) -> tuple[np.ndarray, int]:
        pixels, orientation = (decode_jpeg if is_jpeg else decode_any)(tf.constant(contents))
        return pixels.numpy(), int(orientation)

    return decode


def _inspect_file(decode: Decode, data_dir: str, path: str, class_name: str) -> InspectedFile:
    """Reads and decodes one file, given by its name in the Listing."""
    import imagehash
    from PIL import Image

    from trainer.data import decoders

    full_path = listing.join(data_dir, path)
    is_remote = files.is_remote(full_path)
    contents = (files.read(full_path) or b"") if is_remote else b""
    check = file_checks.check_contents(contents) if is_remote else file_checks.check_file(full_path)
    file = InspectedFile(
        path=path,
        class_name=class_name,
        reason=check.reason,
        image_format=check.image_format,
        content_hash=check.content_hash,
    )
    if not check.content_hash:
        return file
    contents = contents or files.read(full_path) or b""
    size = formats.header_size(contents) or formats.ImageSize(0, 0)
    file = dataclasses.replace(file, num_bytes=len(contents), width=size.width, height=size.height)
    if file.reason:
        return file
    try:
        pixels, orientation = decode(contents, file.image_format == "JPEG")
    except decoders.DECODE_ERRORS as error:
        return dataclasses.replace(file, reason=decoders.decode_error_reason(error))
    bits = imagehash.phash(Image.fromarray(pixels)).hash
    return dataclasses.replace(
        file,
        perceptual_hash=int("".join("01"[bit] for bit in bits.ravel().astype(int)), 2),
        ignored_orientation=_ignored_orientation(contents, orientation),
    )


def _ignored_orientation(contents: bytes, applied: int) -> int:
    """The orientation that Pillow applies, 1 if it is the `applied` one, or if Pillow cannot read the file."""
    from PIL import ExifTags, Image

    if not any(mark in contents for mark in _ORIENTATION_MARKS):
        return 1
    Image.MAX_IMAGE_PIXELS = formats.MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that it repairs
            found = Image.open(io.BytesIO(contents)).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # decoders raise many types on damaged data
        return 1
    return found if found in range(2, 9) and found != applied else 1


def _groups(pairs: Iterable[tuple]) -> list[list[InspectedFile]]:
    """Groups of two or more files with the same key, largest first."""
    groups = collections.defaultdict(list)
    for key, file in pairs:
        groups[key].append(file)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _has_two_labels(group: list[InspectedFile]) -> bool:
    return len({file.class_name for file in group}) > 1


def _near_duplicates(inspected: list[InspectedFile]) -> list[list[InspectedFile]]:
    """Groups of different contents, connected by pairs whose hashes differ in at most NEAR_DISTANCE bits.

    Two hashes that differ in d bits are equal in at least one of d + 1 parts (the pigeonhole principle), so only images
    with an equal part are compared. Each content is represented by its first file.
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
    """The content hashes that a job with default flags holds out."""
    ids = {name: i for i, name in enumerate(sorted({file.class_name for file in inspected}))}
    everything = Examples(
        np.array([file.path for file in inspected], object),
        np.array([ids[file.class_name] for file in inspected], np.int32),
        np.array([file.content_hash for file in inspected], object),
    )
    try:
        return set(splits.split_by_content(everything, 0.2).validation.hashes)
    except UserError:  # too few images to hold any out
        return set()


def summary(result: Inspection) -> dict[str, Any]:
    """The inspection as JSON values, as in inspect.json."""

    def paths(groups: list[list[InspectedFile]]) -> list[list[str]]:
        return [[file.path for file in group] for group in groups]

    small_sides = [file.small_side for file in result.good]
    small_side = {}
    if small_sides:
        small_side = {"min": min(small_sides), "median": float(np.median(small_sides)), "max": max(small_sides)}
    return {
        "files": len(result.inspected),
        "pictures": len(result.good),
        "classes": result.class_counts,
        "notes": list(result.notes),
        "formats": dict(collections.Counter(file.image_format for file in result.good).most_common()),
        "small_side": small_side,
        "bad_files": [{"path": file.path, "reason": file.reason} for file in result.bad],
        "misnamed": [{"path": file.path, "format": file.image_format} for file in result.misnamed],
        "ignored_orientations": [
            {"path": file.path, "orientation": file.ignored_orientation} for file in result.ignored_orientations
        ],
        "small": [{"path": file.path, "width": file.width, "height": file.height} for file in result.small],
        "is_unbalanced": result.is_unbalanced,
        "duplicates": paths(result.same_label_duplicates),
        "duplicates_under_two_labels": paths(result.two_label_duplicates),
        "near_duplicates": paths(result.near_duplicates),
        "near_duplicates_under_two_labels": paths(result.two_label_near_duplicates),
        "leaks": paths(result.leaks),
    }
