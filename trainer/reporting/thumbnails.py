"""Pictures of a report: thumbnails with what the network looked at, and training pictures as augmentation leaves them.

Shapes: [h, w] a heat map.
"""

import concurrent.futures
import functools
import io
import itertools
from typing import Any

import numpy as np
from absl import logging

from trainer.artifacts.run_record import RunRecord
from trainer.data import shards
from trainer.data.inspection import InspectedFile
from trainer.reporting import html
from trainer.reporting.html import data_uri
from trainer.storage import files

_GROUP_THUMBNAIL_SIDE = 160


def of_groups(data_dir: str, groups: list[list[InspectedFile]], *, num_groups: int, num_files: int) -> list[list[dict]]:
    """For the first groups and files of each: path, class_name and the picture as a data URI."""
    return [
        [
            {"path": f.path, "class_name": f.class_name, "uri": _small_jpeg_uri(files.join(data_dir, f.path))}
            for f in group
        ]
        for group in (group[:num_files] for group in itertools.islice(groups, num_groups))
    ]


def _small_jpeg_uri(path: str) -> str:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(files.read(path) or b"")) as image:
            image.draft("RGB", (2 * _GROUP_THUMBNAIL_SIDE, 2 * _GROUP_THUMBNAIL_SIDE))
            shown = ImageOps.exif_transpose(image).convert("RGB")
    except OSError:  # gone, or damaged, since it was inspected
        return ""
    shown.thumbnail((_GROUP_THUMBNAIL_SIDE, _GROUP_THUMBNAIL_SIDE))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=80)
    return html.data_uri(file.getvalue(), "jpeg")


_THUMBNAIL_SIZE = 240  # pixels of the longer side: sharp at 120 CSS pixels on a telephone


_NUM_AUGMENTED = 16


def with_images(record: RunRecord, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `image` (PIL, RGB), `image_uri` and `heat_uri`, which is empty where no heat map is known.

    They are read side by side, since a bucket answers slowly.
    """
    read = functools.partial(thumbnail, record.flags["data_dir"])
    with concurrent.futures.ThreadPoolExecutor(max_workers=12) as pool:
        images = list(pool.map(read, [row["path"] for row in rows]))
    shown = []
    for row, image in zip(rows, images, strict=True):
        heat = record.heatmap(row["path"])
        uris = {"image_uri": _jpeg_uri(image), "heat_uri": "" if heat is None else _heat_uri(heat, image.size)}
        shown.append({**row, **uris, "image": image})
    return shown


def thumbnail(data_dir: str, path: str) -> Any:
    """A picture of a data directory as PIL has it, upright, in RGB, small; a grey one that says so if it cannot be read."""
    from PIL import Image, ImageDraw, ImageOps

    size = (_THUMBNAIL_SIZE, _THUMBNAIL_SIZE)
    try:
        image: Image.Image = Image.open(io.BytesIO(shards.read(data_dir, path) or b""))
        image.draft("RGB", (2 * _THUMBNAIL_SIZE, 2 * _THUMBNAIL_SIZE))  # a large JPEG is decoded at reduced size
        image = ImageOps.exif_transpose(image).convert("RGB")
        image.thumbnail(size)
    except Exception as error:  # decoders raise what they like, and no picture is worth the report
        logging.debug("no thumbnail of %s: %s", path, error)
        image = Image.new("RGB", size, "#b8bec5")
        text = "this picture\ncannot be read\nany more"
        ImageDraw.Draw(image).text((120, 120), text, "#3c444c", anchor="mm", align="center", font_size=24)
    return image


def _jpeg_uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return data_uri(buffer.getvalue(), "jpeg")


def _heat_uri(heat: np.ndarray, size: tuple[int, int]) -> str:
    """A see-through picture in the proportions of `size` (width, height), to lie over it: the hotter, the less see-through."""
    from PIL import Image

    small = (max(1, size[0] // 3), max(1, size[1] // 3))  # pixels; soft anyway, and a page holds many
    share = np.asarray(Image.fromarray(heat).resize(small, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    cold, hot = np.array([230, 30, 90], np.float32), np.array([255, 225, 40], np.float32)  # red to yellow
    pixels = np.concatenate([cold + share * (hot - cold), 210 * share**0.8], axis=2).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "png")


def augmented(record: RunRecord) -> list[tuple[str, np.ndarray]]:
    """Label and pixels of training pictures as the network sees them in the first epoch of fine-tuning; [] without one.

    The draws are those of trainer.data: a function of seed, epoch and the picture's place in split.csv.
    """
    settings = record.flags
    if not (settings.get("augment") and settings.get("epochs") and record.training_rows):
        return []
    import tensorflow as tf

    from trainer.data.preprocessing import augment, augmentation_draws, decode_image

    chosen = np.linspace(0, len(record.training_rows) - 1, min(_NUM_AUGMENTED, len(record.training_rows))).astype(int)
    draws = augmentation_draws(settings["seed"], 0, len(record.training_rows))
    shown = []
    for i in chosen:
        row = record.training_rows[i]
        contents = shards.read(settings["data_dir"], row["path"])
        try:
            image = decode_image(tf.constant(contents or b""), settings["image_size"])
        except tf.errors.InvalidArgumentError:  # gone, or damaged, since
            continue
        augmented = augment(image[None], tf.constant(draws[i : i + 1]))[0].numpy()
        shown.append((row["label"], augmented.astype(np.uint8)))
    return shown
