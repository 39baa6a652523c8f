"""Turns the bytes of an image into the input of the network, the same for training, evaluation and serving.

Shapes: B images in a batch, h x w the pixels of an image, S pixels to a side, N examples.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.data import decoders, file_bytes

# Of ImageNet's training images, as in keras.applications.imagenet_utils: the means of blue, green and red in 0 to 255
# ("caffe"); the means and standard deviations of red, green and blue in 0 to 1 ("torch").
IMAGENET_BGR_MEANS = (103.939, 116.779, 123.68)
IMAGENET_MEANS, IMAGENET_DEVIATIONS = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

# Of the margins of --resize=pad, RGB: the mean of ImageNet. Preprocessing for ImageNet weights makes it about 0, as are
# the margins that convolutions add, so it carries no evidence. It is the same for every preprocessing, because callers
# that resize images themselves must know it.
PAD_COLOR = (124, 116, 104)


@dataclasses.dataclass(frozen=True)
class NetworkInput:
    """How the bytes of an image become the input of a network: the same in training, evaluation and serving."""

    image_size: int  # pixels
    resize: str  # stretch, pad or crop: see `resize`
    preprocessing: str  # as `preprocess` takes it


def decode_image(contents: tf.Tensor, network_input: NetworkInput, *, with_webp: bool = True) -> tf.Tensor:
    """Decodes the bytes of a file to an upright RGB image uint8 [S, S, 3], resized as `resize` does it.

    Supports JPEG, PNG, GIF (first frame), BMP and WebP, detected by content; transparent pixels are composited on white
    (see decoders). A JPEG of twice the size or more is decoded at 1/2, 1/4 or 1/8 of its size, which libjpeg does at a
    fraction of the cost.
    Raises tf.errors.InvalidArgumentError when it runs on other bytes, or on a header that claims too many pixels.
    """
    by_longer_side = network_input.resize == "pad"
    decoded = decoders.decode(contents, network_input.image_size, by_longer_side=by_longer_side, with_webp=with_webp)
    return _resize_decoded(decoded, network_input)


def decode_jpeg_image(contents: tf.Tensor, network_input: NetworkInput) -> tf.Tensor:
    """As `decode_image`, for JPEG only: the same image from a smaller graph."""
    by_longer_side = network_input.resize == "pad"
    decoded = decoders.decode_jpeg(contents, network_input.image_size, by_longer_side=by_longer_side)
    return _resize_decoded(decoded, network_input)


def resize(pixels: tf.Tensor, network_input: NetworkInput, *, is_reduced: tf.Tensor | bool = False) -> tf.Tensor:
    """Resizes images uint8 [..., h, w, 3] to squares uint8 [..., S, S, 3].

    stretch: the whole image, without keeping the aspect ratio. pad: the whole image, with equal margins of PAD_COLOR on
    both sides. crop: the square in the middle of the image, of the length of its shorter side. All three commute with
    rotations and flips. Where the middle falls between two pixels, the margins are rounded by at most half a pixel, and
    the cropped square is one pixel longer.

    An image more than twice as large is resized by area, any other bilinearly. `is_reduced` says that the decoder has
    already reduced it, so it is resized by area.
    """
    size = network_input.image_size
    squares = [*pixels.shape[:-3], size, size, 3]
    if network_input.resize == "crop":
        pixels = _crop_to_square(pixels)
    sides = tf.shape(pixels)[-3:-1]  # h, w
    if network_input.resize == "pad":
        margins = _margins(sides, size)
        resized = _resize(pixels, size - 2 * margins, is_reduced | (tf.reduce_max(sides) > 2 * size))
        return tf.ensure_shape(_add_margins(resized, margins), squares)
    return tf.ensure_shape(_resize(pixels, [size, size], is_reduced | (tf.reduce_min(sides) > 2 * size)), squares)


def _resize(pixels: tf.Tensor, sides: tf.Tensor | list[int], is_large: tf.Tensor) -> tf.Tensor:
    resized = tf.cond(is_large, lambda: _resize_by_area(pixels, sides), lambda: tf.image.resize(pixels, sides))
    return tf.cast(tf.round(resized), tf.uint8)  # both methods average, so values stay in 0 to 255


@file_bytes.rarely_used
def _resize_by_area(pixels: tf.Tensor, sides: tf.Tensor | list[int]) -> tf.Tensor:
    return tf.image.resize(pixels, sides, method="area")  # half the CPU time of antialias=True


def _crop_to_square(pixels: tf.Tensor) -> tf.Tensor:
    """The central square of images [..., h, w, 3]; one side is a pixel longer where an equal one is not in the middle."""
    sides = tf.shape(pixels)[-3:-1]
    shorter = tf.reduce_min(sides)
    kept = shorter + (sides - shorter) % 2
    top, left = tf.unstack((sides - kept) // 2)
    return pixels[..., top : top + kept[0], left : left + kept[1], :]


def _margins(sides: tf.Tensor, size: int) -> tf.Tensor:
    """Height of the upper and width of the left margin, int32 [2]; the opposite margin is equal. Some image remains."""
    sides = tf.cast(sides, tf.int64)
    longer = tf.reduce_max(sides)
    rounded = (size * (longer - sides) + longer) // (2 * longer)
    return tf.cast(tf.minimum(rounded, (size - 1) // 2), tf.int32)


def _add_margins(images: tf.Tensor, margins: tf.Tensor) -> tf.Tensor:
    color = tf.constant(PAD_COLOR, tf.int32)
    one_side = tf.concat([tf.zeros([images.shape.rank - 3], tf.int32), margins, [0]], axis=0)
    padded = tf.pad(tf.cast(images, tf.int32) - color, tf.stack([one_side, one_side], axis=1))
    return tf.cast(padded + color, tf.uint8)


def _resize_decoded(decoded: decoders.Decoded, network_input: NetworkInput) -> tf.Tensor:
    image = decoded.pixels
    image.set_shape([None, None, 3])
    resized = resize(image, network_input, is_reduced=decoded.is_reduced)
    # Rotating the square gives the same image as resizing the rotated one, on fewer pixels: `resize` is symmetric.
    upright = decoders.apply_orientation(resized, decoded.orientation)
    return tf.ensure_shape(upright, [network_input.image_size, network_input.image_size, 3])


def preprocess(images: tf.Tensor, preprocessing: str) -> tf.Tensor:
    """The input of the network, float32 [B, S, S, 3], from RGB in 0 to 255 of any numeric dtype and the same shape.

    `rescale`: times 1/255. The others are the modes of keras.applications.imagenet_utils.preprocess_input that ImageNet
    weights were trained on (see models.backbones). `caffe`: blue, green, red, minus the means of ImageNet. `torch`: means 0
    and deviations 1 over ImageNet. `tf`: -1 to 1.
    """
    # XLA, which the input pipeline uses, fuses a product and a sum and then rounds once; a sum and a product it does not.
    images = tf.cast(images, tf.float32)
    if preprocessing == "rescale":
        return images * (1 / 255)
    if preprocessing == "caffe":
        return tf.reverse(images, [-1]) - tf.constant(IMAGENET_BGR_MEANS)
    if preprocessing == "torch":
        means, scale = 255 * IMAGENET_MEANS, 1 / (255 * IMAGENET_DEVIATIONS)
        return (images - tf.constant(means, tf.float32)) * tf.constant(scale, tf.float32)
    if preprocessing == "tf":
        return (images - 127.5) * (1 / 127.5)
    raise ValueError(f"preprocessing is {preprocessing!r}: pass rescale, caffe, torch or tf.")


NUM_BASIC_DRAWS = 8
NUM_AUGMENTATION_DRAWS = 12  # with those of `strong`

# Fraction of the image's area. Inception's 0.08 (arXiv:1409.4842) is for a million images, not for a small folder.
MIN_CROP_AREA = 0.5
STRONG_MIN_CROP_AREA = 0.25

# Largest distance of the factors from 1: the range in which cameras and light differ, so the label stays valid. Hue is
# not changed, because color distinguishes many classes.
BRIGHTNESS, SATURATION, CONTRAST = 0.2, 0.3, 0.2
STRONG_COLOR_FACTOR = 2.0
MAX_ANGLE = np.pi / 12  # radians: 15 degrees, as a camera is held; more would turn a 6 towards a 9
MAX_ERASED_SIDE = 0.5  # of the image's side

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601, as JPEG


class Augmentation(NamedTuple):
    """How the training images of an epoch are changed."""

    seed: int
    epoch: int
    strength: str  # basic or strong
    flips: bool  # left to right


def augmentation_draws(augmentation: Augmentation, num_examples: int) -> np.ndarray:
    """Uniform random numbers in [0, 1) for `augment`, float32 [N, NUM_AUGMENTATION_DRAWS], from (seed, epoch)."""
    # 1: a stream of its own, apart from the order's.
    generator = np.random.default_rng([augmentation.seed, augmentation.epoch, 1])
    draws = generator.random((num_examples, NUM_BASIC_DRAWS), np.float32)
    strong_draws = generator.random((num_examples, NUM_AUGMENTATION_DRAWS - NUM_BASIC_DRAWS), np.float32)
    return np.concatenate([draws, strong_draws], axis=1)


def augment(images: tf.Tensor, draws: tf.Tensor, *, strength: str = "basic", flips: bool = True) -> tf.Tensor:
    """Crops, flips and recolors each image by its own draws: float32 [B, S, S, 3] in 0 to 255 from uint8.

    `draws` is float32 [B, NUM_AUGMENTATION_DRAWS], uniform in [0, 1): area, aspect ratio, position (2), flip,
    brightness, saturation, contrast; for `strong` also angle, size and position (2) of the erased part. The result
    depends on nothing else, so the augmentation of an image is the same on every worker and after a restart.
    """
    is_strong = strength == "strong"
    min_crop_area = STRONG_MIN_CROP_AREA if is_strong else MIN_CROP_AREA
    # In float64, because float32 functions round in the last bit by the position in a vector, and so by the batch: a crop
    # then moved by up to 1e-7 of the image, and one worker and two trained on different pixels.
    crop_draws = tf.cast(draws[:, :4], tf.float64)
    area = min_crop_area + (1 - min_crop_area) * crop_draws[:, 0]
    aspect_ratio = tf.exp(np.log(4 / 3) * (2 * crop_draws[:, 1] - 1))  # width to height, 3:4 to 4:3
    height = tf.minimum(tf.sqrt(area / aspect_ratio), 1.0)
    width = tf.minimum(tf.sqrt(area * aspect_ratio), 1.0)
    top, left = crop_draws[:, 2] * (1 - height), crop_draws[:, 3] * (1 - width)
    is_flipped = (draws[:, 4] < 0.5) & flips
    left, right = tf.where(is_flipped, left + width, left), tf.where(is_flipped, left, left + width)
    boxes = tf.stack([top, left, top + height, right], axis=1)  # [B, 4]; right < left flips
    shape = tf.shape(images)
    cropped = tf.image.crop_and_resize(images, tf.cast(boxes, tf.float32), tf.range(shape[0]), shape[1:3])
    if not is_strong:
        return tf.ensure_shape(_adjust_colors(cropped, draws[:, 5:8]), images.shape)
    colored = _adjust_colors(_rotate(cropped, draws[:, 8]), draws[:, 5:8], STRONG_COLOR_FACTOR)
    return tf.ensure_shape(_erase_part(colored, draws[:, 9:12]), images.shape)


def _rotate(images: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Rotates each image around its center by up to MAX_ANGLE; the corners mirror the image."""
    angle = MAX_ANGLE * (2 * tf.cast(draws, tf.float64) - 1)  # float64, as the crops in augment
    cosine, sine = (tf.cast(function(angle), tf.float32) for function in (tf.cos, tf.sin))
    zero = tf.zeros_like(cosine)
    center = (tf.cast(tf.shape(images)[1], tf.float32) - 1) / 2
    x_offset, y_offset = center * (1 - cosine + sine), center * (1 - sine - cosine)
    # Rows of the projective transform from output to input pixels: x' = cos x - sin y + x_offset, and so on.
    transforms = tf.stack([cosine, -sine, x_offset, sine, cosine, y_offset, zero, zero], axis=1)  # [B, 8]
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=transforms,
        output_shape=tf.shape(images)[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )


def _erase_part(images: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Replaces a square of each image by its mean color, so that no single part decides (Zhong et al., 2017)."""
    positions = tf.linspace(0.0, 1.0, tf.shape(images)[1])[None]  # [1, S]
    side = MAX_ERASED_SIDE * draws[:, 0:1]  # [B, 1]
    top, left = draws[:, 1:2] * (1 - side), draws[:, 2:3] * (1 - side)
    rows, columns = ((positions >= start) & (positions < start + side) for start in (top, left))  # [B, S] each
    is_erased = (rows[:, :, None] & columns[:, None])[..., None]  # [B, S, S, 1]
    return tf.where(is_erased, tf.reduce_mean(images, axis=[1, 2], keepdims=True), images)


def _adjust_colors(images: tf.Tensor, draws: tf.Tensor, factor: float = 1.0) -> tf.Tensor:
    """Applies brightness, saturation and contrast, which are all linear, as a 3 x 3 matrix and an offset per image."""
    factors = 1 + factor * tf.constant([BRIGHTNESS, SATURATION, CONTRAST]) * (2 * draws - 1)  # [B, 3]
    brightness, saturation, contrast = (factors[:, i, None, None] for i in range(3))
    gray = tf.constant(LUMA)[:, None] * tf.ones([1, 3])  # maps RGB to its luma, three times
    matrix = brightness * contrast * (saturation * tf.eye(3) + (1 - saturation) * gray)  # [B, 3, 3]
    shape = tf.shape(images)
    flat = tf.reshape(images, [shape[0], -1, 3])  # [B, S*S, 3]
    mean_luma = tf.reduce_sum(
        tf.reduce_mean(flat, axis=1, keepdims=True) * tf.constant(LUMA), -1, keepdims=True
    )  # [B, 1, 1]
    adjusted = tf.linalg.matmul(flat, matrix) + brightness * (1 - contrast) * mean_luma
    return tf.reshape(tf.clip_by_value(adjusted, 0.0, 255.0), shape)
