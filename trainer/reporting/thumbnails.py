"""Images in reports: thumbnails with Grad-CAM heat maps, and augmented training images.

Shapes: S pixels to a side, [h, w] a heat map.
"""

import io
import itertools
from typing import Any

import numpy as np
from absl import logging

from trainer.artifacts.run_record import RunRecord
from trainer.data import shards
from trainer.data.inspection import InspectedFile
from trainer.formatting import translate
from trainer.reporting import html
from trainer.storage import files

_REPORT_SIZE = 240  # pixels of the longer side: sharp at 120 CSS pixels on a phone
_GROUP_SIZE = 160
_READ_PARALLELISM = 12  # a bucket has a high latency
_NUM_AUGMENTED = 16


def with_images(run: RunRecord, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of predictions with `image` (PIL, RGB), `image_uri` and `heat_uri`, "" where there is no heat map.

    An image that cannot be read is a gray placeholder.
    """
    images = _thumbnails(run.flags["data_dir"], [row["path"] for row in rows], _REPORT_SIZE)
    result = []
    for row, thumbnail in zip(rows, images, strict=True):
        image = _placeholder() if thumbnail is None else thumbnail
        heatmap = run.heatmap(row["path"])
        result.append(
            {
                **row,
                "image": image,
                "image_uri": _jpeg_uri(image),
                "heat_uri": "" if heatmap is None else _heat_uri(heatmap, image.size, run.resize),
            }
        )
    return result


def of_groups(data_dir: str, groups: list[list[InspectedFile]], *, num_groups: int, num_files: int) -> list[list[dict]]:
    """The first files of the first groups: `path`, `class_name`, and `uri` of the image, "" if it cannot be read."""
    shown = [group[:num_files] for group in itertools.islice(groups, num_groups)]
    images = iter(_thumbnails(data_dir, [file.path for group in shown for file in group], _GROUP_SIZE))

    def values(file: InspectedFile) -> dict:
        image = next(images)
        return {"path": file.path, "class_name": file.class_name, "uri": "" if image is None else _jpeg_uri(image)}

    return [[values(file) for file in group] for group in shown]


def of_pairs(run: RunRecord) -> list[dict[str, Any]]:
    """The pairs of run.look_alikes with `uri` and `training_uri` of their images, "" if one cannot be read."""
    pairs = run.look_alikes.get("pairs", [])
    images = _thumbnails(
        run.flags["data_dir"], [pair[key] for pair in pairs for key in ("path", "training_path")], _REPORT_SIZE
    )
    uris = iter(["" if image is None else _jpeg_uri(image) for image in images])
    return [{**pair, "uri": next(uris), "training_uri": next(uris)} for pair in pairs]


def thumbnail(data_dir: str, path: str, size: int) -> Any:
    """An image of a data directory: PIL, upright, RGB, `size` pixels on the longer side; None if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(shards.read(data_dir, path) or b"")) as image:
            image.draft("RGB", (2 * size, 2 * size))  # decodes a large JPEG at reduced size
            upright = ImageOps.exif_transpose(image).convert("RGB")
        upright.thumbnail((size, size))
    except Exception as error:  # decoders raise any type, and a report does not fail for one image
        logging.debug("no thumbnail of %s: %s", path, error)
        return None
    return upright


def _thumbnails(data_dir: str, paths: list[str], size: int) -> list[Any]:
    def read(path: str) -> Any:
        return thumbnail(data_dir, path, size)

    return files.parallel(read, paths, workers=_READ_PARALLELISM)


def _placeholder() -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_REPORT_SIZE, _REPORT_SIZE), "#b8bec5")
    center = (_REPORT_SIZE // 2, _REPORT_SIZE // 2)
    text = translate("this image\ncannot be read")
    ImageDraw.Draw(image).text(center, text, "#3c444c", anchor="mm", align="center", font_size=24)
    return image


def _jpeg_uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return html.data_uri(buffer.getvalue(), "jpeg")


def _heat_uri(heatmap: np.ndarray, size: tuple[int, int], resize: str) -> str:
    """A heat map uint8 [h, w] as an overlay in the proportions of `size` (width, height): high values are opaque."""
    from PIL import Image

    small = (max(1, size[0] // 3), max(1, size[1] // 3))  # pixels; enough for a smooth overlay, and a page holds many
    share = np.asarray(over_image(Image.fromarray(heatmap), small, resize), np.float32)[..., None] / 255
    cold, hot = np.array(html.HEAT_COLORS, np.float32)
    opacity = html.HEAT_OPACITY * share**html.HEAT_POWER
    pixels = np.concatenate([cold + share * (hot - cold), opacity], axis=2).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG", optimize=True)
    return html.data_uri(buffer.getvalue(), "png")


def over_image(heatmap: Any, size: tuple[int, int], resize: str) -> Any:
    """A heat map of the network's input (PIL, L) over the image of `size` (width, height) that `resize` made it from.

    The network does not see what `crop` leaves out: 0 there.
    """
    from PIL import Image

    (width, height), (columns, rows) = size, heatmap.size
    if resize == "crop":
        side = min(size)
        whole = Image.new("L", size)
        square = heatmap.resize((side, side), Image.Resampling.BICUBIC)
        whole.paste(square, ((width - side) // 2, (height - side) // 2))
        return whole
    box = (0.0, 0.0, float(columns), float(rows))
    if resize == "pad":
        left, top = columns / 2 * (1 - width / max(size)), rows / 2 * (1 - height / max(size))
        box = (left, top, columns - left, rows - top)
    return heatmap.resize(size, Image.Resampling.BICUBIC, box=box)


def augmented(run: RunRecord) -> list[tuple[str, np.ndarray]]:
    """Label and pixels, uint8 [S, S, 3], of training images in the first epoch of fine-tuning; [] without augmentation.

    The random draws are those of training: a function of the seed, the epoch and the index among the training images.
    """
    settings = run.flags
    if run.is_evaluation or run.augment == "none" or not settings["epochs"] or not run.training_rows:
        return []
    import tensorflow as tf

    from trainer.data.preprocessing import Augmentation, augment, augmentation_draws, decode_image
    from trainer.models import backbones

    num_training = len(run.training_rows)
    indices = np.linspace(0, num_training - 1, min(_NUM_AUGMENTED, num_training)).astype(int)
    augmentation = Augmentation(settings["seed"], 0, run.augment, run.flips)
    draws = augmentation_draws(augmentation, num_training)
    network_input = backbones.input_from_flags(settings)
    result = []
    for i in indices:
        row = run.training_rows[i]
        contents = shards.read(settings["data_dir"], row["path"])
        try:
            image = decode_image(tf.constant(contents or b""), network_input)
        except tf.errors.InvalidArgumentError:  # deleted or damaged since the run started
            continue
        augmented_image = augment(image[None], tf.constant(draws[i : i + 1]), strength=run.augment, flips=run.flips)
        pixels = augmented_image[0].numpy()
        result.append((row["label"], pixels.astype(np.uint8)))
    return result
