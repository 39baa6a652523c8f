"""Converts images that TensorFlow does not decode, such as HEIC of phones, AVIF and TIFF, to JPEG, before training.

Only there: a model that is served gets JPEG, as browsers and phones send it, and needs no other decoder.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.data import formats, listing, shards
from trainer.errors import UserError
from trainer.storage import files

# Not JPEG, PNG, GIF and WebP: what is rejected of them is damaged, or made to take minutes to decode.
CONVERTED_FORMATS = frozenset({"HEIC", "AVIF", "TIFF", "BMP"})

JPEG_QUALITY = 95  # above it, files grow and images do not improve (Pillow's documentation of JPEG)
_BATCH_SIZE = 64  # images read in parallel


@contextlib.contextmanager
def converted_folder(data_dir: str, *, on_images: Callable[[int], None]) -> Iterator[str]:
    """A folder with the images of a data directory, local or gs://, those of CONVERTED_FORMATS as JPEG under their names.

    The folder exists during the block. Images of a local directory are links; those of a bucket are downloaded, and so need
    room on the local disk. `on_images` receives the number of images that are done. What Pillow does not read either stays
    as it is, and so does a BMP that needs no conversion. Raises UserError for HEIC without the package that reads it.
    """
    with tempfile.TemporaryDirectory() as directory:
        names = listing.list_files(data_dir, min_classes=1).paths
        for start in range(0, len(names), _BATCH_SIZE):
            batch = names[start : start + _BATCH_SIZE]
            for name, contents in zip(batch, files.parallel(lambda n: shards.read(data_dir, n), batch), strict=True):
                _write(data_dir, name, contents or b"", listing.join(directory, name))
            on_images(len(batch))
        yield directory


def _write(data_dir: str, name: str, contents: bytes, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    converted = to_jpeg(contents) if formats.rejection_reason(contents) else None
    if converted is None and not files.is_remote(data_dir):
        os.symlink(os.path.abspath(listing.join(data_dir, name)), target)
        return
    with open(target, "wb") as file:
        file.write(contents if converted is None else converted)


def to_jpeg(contents: bytes) -> bytes | None:
    """The first image of a file as an upright RGB JPEG, transparent pixels on white.

    None for other formats, and if Pillow cannot read it. Raises UserError for HEIC without the package that reads it.
    """
    detected = formats.detect_format(contents)
    if detected not in CONVERTED_FORMATS:
        return None
    if detected == "HEIC":
        _register_heif()
    try:
        with Image.open(io.BytesIO(contents)) as image:
            upright = _as_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    output = io.BytesIO()
    upright.save(output, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return output.getvalue()


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _register_heif() -> None:
    try:
        import pillow_heif
    except ModuleNotFoundError:
        raise UserError("--convert found HEIC images: pip install pillow-heif, which reads them.") from None
    pillow_heif.register_heif_opener()
