"""Draws the demo set, images of discs, rings and stars, in a few seconds and without a download.

Only the shape depends on the class. Area, position, angle, colors, background, distractors, blur and noise have the
same distribution in every class, so a network that classifies well has learned the shapes.

Shapes: S pixels to a side, V corners of an outline.
"""

import colorsys
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
from absl import logging
from PIL import Image, ImageDraw, ImageFilter

from trainer.errors import UserError

# The hole of a ring and the inner corners of a star, as parts of the outer radius.
_HOLE = 0.7
_NOTCH = 0.42

# The area of each class at radius 1; the radius that gives all classes the same area follows from it.
_UNIT_AREAS = {"disc": np.pi, "ring": np.pi * (1 - _HOLE**2), "star": 5 * _NOTCH * np.sin(np.pi / 5)}

# Masks are drawn this many times larger and averaged, for smooth edges.
_SUPERSAMPLING = 4

# Holds the parameters of the set. `listing` ignores hidden files.
_MARKER = ".demo.json"


def draw(directory: str | os.PathLike, *, images_per_class: int = 200, image_size: int = 96, seed: int = 0) -> None:
    """Writes `images_per_class` JPEG files per class to `directory`, as in `disc/disc_0001.jpg`.

    The same parameters give the same bytes, and a smaller set is the beginning of a larger one. A complete set with the
    same parameters is not changed. The folder is created atomically. `image_size` is in pixels.

    Raises:
      UserError: a parameter is out of range, or `directory` is not local, cannot be written or has other contents.
    """
    if "://" in os.fspath(directory):
        raise UserError(f"The demo images are drawn on a local disk, but {directory} is not a local folder: pass one.")
    directory = pathlib.Path(directory).absolute()
    if images_per_class < 1:
        raise UserError(f"images_per_class is {images_per_class}, but every class needs an image: pass 1 or more.")
    if image_size < 32:
        raise UserError(f"image_size is {image_size}, but shapes are too blurred below 32 pixels: pass 32 or more.")
    if seed < 0:
        raise UserError(f"seed is {seed}, but NumPy accepts no negative seed: pass 0 or more.")
    parameters = {"images_per_class": images_per_class, "image_size": image_size, "seed": seed}
    try:
        # Checked first: a set that another worker completes meanwhile counts as complete, not as other contents.
        is_occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
        if _is_complete(directory, parameters):
            logging.info("%s already holds the demo images.", directory)
            return
        if is_occupied:
            raise UserError(
                f"{directory} is neither an empty folder nor the complete demo set of {parameters}: "
                "delete it, or pass a folder that is empty or does not exist."
            )
        _draw_all(directory, parameters)
    except OSError as error:
        raise UserError(
            f"The demo images cannot be written to {directory} ({error}): pass a writable folder on a local disk with "
            "free space."
        ) from error
    logging.info("Drew %d images of each of %s in %s.", images_per_class, ", ".join(_UNIT_AREAS), directory)


def _is_complete(directory: pathlib.Path, parameters: dict[str, int]) -> bool:
    """Whether `directory` was drawn with these parameters and has every image."""
    marker = directory / _MARKER
    if not marker.is_file() or marker.read_text() != json.dumps(parameters):
        return False
    return all(
        len(list(directory.glob(f"{name}/{name}_*.jpg"))) == parameters["images_per_class"] for name in _UNIT_AREAS
    )


def _draw_all(directory: pathlib.Path, parameters: dict[str, int]) -> None:
    """Draws in a hidden sibling folder and renames it when it is complete."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for label, name in enumerate(_UNIT_AREAS):
            (unfinished / name).mkdir()
            for index in range(1, parameters["images_per_class"] + 1):
                rng = np.random.default_rng([parameters["seed"], label, index])
                image = _draw_image(name, parameters["image_size"], rng)
                image.save(unfinished / name / f"{name}_{index:04d}.jpg", quality=92)
        (unfinished / _MARKER).write_text(json.dumps(parameters))
        # mkdtemp gives no access to other users, but a container often runs as another user.
        unfinished.chmod(0o755)
        try:
            unfinished.rename(directory)
        except OSError:
            # Another worker on the same disk may have been faster; its images are the same.
            if not _is_complete(directory, parameters):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _draw_image(name: str, image_size: int, rng: np.random.Generator) -> Image.Image:
    """One shape of this class on a background."""
    # Always light on dark: ResNet50 from random weights then reaches an accuracy of 0.99 in 8 epochs of 384 images;
    # with light and dark in either order it reached 0.95.
    background_luma, shape_luma = rng.uniform(0.12, 0.28), rng.uniform(0.72, 0.90)
    pixels = _background(image_size, background_luma, rng)
    for _ in range(rng.integers(1, 5)):
        pixels = _with_distractor(pixels, background_luma, rng)
    pixels = _with_shape(pixels, name, shape_luma, rng)
    pixels = pixels * rng.uniform(0.9, 1.1) + rng.normal(0, rng.uniform(0.005, 0.03), pixels.shape)
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.006) * image_size))


def _background(image_size: int, luma: float, rng: np.random.Generator) -> np.ndarray:
    """Two related colors in a linear or radial gradient, in blotches or in stripes: float [S, S, 3] in 0..1."""
    hue = rng.uniform()
    first = _color(hue, luma - rng.uniform(0, 0.08), rng)
    second = _color(hue + rng.uniform(-0.15, 0.15), luma + rng.uniform(0, 0.08), rng)
    y, x = np.mgrid[0:image_size, 0:image_size] / image_size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = rng.integers(4)
    if kind == 0:
        share = along + 0.5
    elif kind == 1:
        share = np.hypot(x - rng.uniform(-0.5, 0.5), y - rng.uniform(-0.5, 0.5))
    elif kind == 2:
        cells = Image.fromarray(rng.uniform(size=(6, 6)).astype(np.float32))
        share = np.asarray(cells.resize((image_size, image_size), Image.Resampling.BICUBIC))
    else:
        share = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(3, 8) * along)
    share = share.clip(0, 1)[..., None]
    return (1 - share) * first + share * second


def _with_distractor(pixels: np.ndarray, luma: float, rng: np.random.Generator) -> np.ndarray:
    """Adds a line, a dot or an arc in a color close to the background's."""
    side = len(pixels) * _SUPERSAMPLING
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    x, y = rng.uniform(0, side, 2)
    radius = rng.uniform(0.015, 0.05) * side
    width = round(rng.uniform(0.008, 0.025) * side)
    kind = rng.integers(3)
    if kind == 0:
        pen.line([x, y, *rng.uniform(0, side, 2)], fill=255, width=width)
    elif kind == 1:
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    else:
        radius *= 4
        start = rng.uniform(0, 360)
        box = [x - radius, y - radius, x + radius, y + radius]
        pen.arc(box, start, start + rng.uniform(40, 120), fill=255, width=width)
    color = _color(rng.uniform(), luma + rng.uniform(-0.12, 0.16), rng)
    return _painted(pixels, mask, color, rng.uniform(0.5, 0.9))


def _with_shape(pixels: np.ndarray, name: str, luma: float, rng: np.random.Generator) -> np.ndarray:
    """Adds the shape, rotated at random. It covers 9 to 19 % of the image in every class."""
    side = len(pixels) * _SUPERSAMPLING
    area = np.square(rng.uniform(0.30, 0.44) * side)
    radius = np.sqrt(area / _UNIT_AREAS[name])
    # The star has the largest radius. All shapes keep its distance from the border, or the position would depend on the
    # class.
    reach = np.sqrt(area / min(_UNIT_AREAS.values()))
    center = rng.uniform(reach, side - reach, 2)
    angle = rng.uniform(0, 2 * np.pi)

    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if name == "star":
        angles = angle + np.pi / 5 * np.arange(10)
        radii = radius * np.where(np.arange(10) % 2, _NOTCH, 1)
        corners = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)  # [V=10, 2]
        pen.polygon([tuple(corner) for corner in corners], fill=255)
    else:
        pen.ellipse([*(center - radius), *(center + radius)], fill=255)
    if name == "ring":
        pen.ellipse([*(center - _HOLE * radius), *(center + _HOLE * radius)], fill=0)

    hue = rng.uniform()
    first, second = _color(hue, luma - 0.06, rng), _color(hue + rng.uniform(-0.1, 0.1), luma + 0.06, rng)
    y, x = np.mgrid[0 : len(pixels), 0 : len(pixels)] / len(pixels) - 0.5
    slope = rng.uniform(0, 2 * np.pi)
    share = (0.5 + x * np.cos(slope) + y * np.sin(slope)).clip(0, 1)[..., None]
    return _painted(pixels, mask, (1 - share) * first + share * second, 1.0)


def _color(hue: float, luma: float, rng: np.random.Generator) -> np.ndarray:
    """A color of that hue with exactly that luma (Rec. 601, 0..1): float [3]."""
    color = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.2, 0.65), 1.0))
    full = color @ (0.299, 0.587, 0.114)
    if luma < full:
        return color * luma / full
    return 1 - (1 - color) * (1 - luma) / (1 - full)


def _painted(pixels: np.ndarray, mask: Image.Image, color: np.ndarray, opacity: float) -> np.ndarray:
    """`pixels` with `color`, one or one per pixel, where the supersampled `mask` is white."""
    share = np.asarray(mask.reduce(_SUPERSAMPLING))[..., None] / 255 * opacity
    return pixels + share * (color - pixels)
