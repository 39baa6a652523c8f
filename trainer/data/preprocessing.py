"""Turns the bytes of an image into the input of the network, the same for training, evaluation and serving.

Shapes: B images in a batch, S pixels to a side, N examples.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.data import decoders

# Channel means of ImageNet's training images, blue, green, red. Keras' ResNet50 weights were trained on images minus
# these means (the "caffe" mode of keras.applications.imagenet_utils.preprocess_input).
IMAGENET_BGR_MEANS = (103.939, 116.779, 123.68)


def decode_image(contents: tf.Tensor, image_size: int, *, with_webp: bool = True) -> tf.Tensor:
    """Decodes the bytes of a file to an upright RGB image uint8 [S, S, 3], resized without keeping the aspect ratio.

    Supports JPEG, PNG, GIF (first frame), BMP and WebP, detected by content; transparent pixels are composited on white
    (see decoders). A JPEG of twice the size or more is decoded at 1/2, 1/4 or 1/8 of its size, which libjpeg does at a
    fraction of the cost. An image more than twice as large is resized by area, any other bilinearly.
    Raises tf.errors.InvalidArgumentError when it runs on other bytes, or on a header that claims too many pixels.
    """
    return _resize_decoded(decoders.decode(contents, image_size, with_webp=with_webp), image_size)


def decode_jpeg_image(contents: tf.Tensor, image_size: int) -> tf.Tensor:
    """As `decode_image`, for JPEG only: the same image from a smaller graph."""
    return _resize_decoded(decoders.decode_jpeg(contents, image_size), image_size)


def resize(pixels: tf.Tensor, image_size: int, *, is_reduced: tf.Tensor | bool = False) -> tf.Tensor:
    """Resizes images uint8 [..., h, w, 3] to squares uint8 [..., S, S, 3] without keeping the aspect ratio.

    `is_reduced` says that the decoder has already reduced them, so they are resized by area.
    """
    is_large = is_reduced | (tf.reduce_min(tf.shape(pixels)[-3:-1]) > 2 * image_size)
    size = [image_size, image_size]
    resized = tf.cond(is_large, lambda: _resize_by_area(pixels, size), lambda: tf.image.resize(pixels, size))
    return tf.cast(tf.round(resized), tf.uint8)  # both methods average, so values stay in 0 to 255


@decoders.rarely_used
def _resize_by_area(pixels: tf.Tensor, size: list[int]) -> tf.Tensor:
    return tf.image.resize(pixels, size, method="area")  # half the CPU time of antialias=True


def _resize_decoded(decoded: decoders.Decoded, image_size: int) -> tf.Tensor:
    image = decoded.pixels
    image.set_shape([None, None, 3])
    resized = resize(image, image_size, is_reduced=decoded.is_reduced)
    # Rotating the resized square gives the same image as resizing the rotated one, on fewer pixels.
    return tf.ensure_shape(decoders.apply_orientation(resized, decoded.orientation), [image_size, image_size, 3])


def preprocess(images: tf.Tensor, preprocessing: str) -> tf.Tensor:
    """The input of the network, float32 [B, S, S, 3], from RGB in 0 to 255 of any numeric dtype and the same shape.

    `imagenet`: blue, green, red, minus the means of ImageNet, as Keras' weights expect. `rescale`: times 1/255.
    """
    images = tf.cast(images, tf.float32)
    if preprocessing == "rescale":
        return images * (1 / 255)
    return tf.reverse(images, [-1]) - tf.constant(IMAGENET_BGR_MEANS)


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
    area = min_crop_area + (1 - min_crop_area) * draws[:, 0]
    aspect_ratio = tf.exp(tf.math.log(4 / 3) * (2 * draws[:, 1] - 1))  # width to height, 3:4 to 4:3
    height = tf.minimum(tf.sqrt(area / aspect_ratio), 1.0)
    width = tf.minimum(tf.sqrt(area * aspect_ratio), 1.0)
    top, left = draws[:, 2] * (1 - height), draws[:, 3] * (1 - width)
    is_flipped = (draws[:, 4] < 0.5) & flips
    left, right = tf.where(is_flipped, left + width, left), tf.where(is_flipped, left, left + width)
    boxes = tf.stack([top, left, top + height, right], axis=1)  # [B, 4]; right < left flips
    shape = tf.shape(images)
    cropped = tf.image.crop_and_resize(images, boxes, tf.range(shape[0]), shape[1:3])
    if not is_strong:
        return tf.ensure_shape(_adjust_colors(cropped, draws[:, 5:8]), images.shape)
    colored = _adjust_colors(_rotate(cropped, draws[:, 8]), draws[:, 5:8], STRONG_COLOR_FACTOR)
    return tf.ensure_shape(_erase_part(colored, draws[:, 9:12]), images.shape)


def _rotate(images: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Rotates each image around its center by up to MAX_ANGLE; the corners mirror the image."""
    angle = MAX_ANGLE * (2 * draws - 1)
    cosine, sine, zero = tf.cos(angle), tf.sin(angle), tf.zeros_like(angle)
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
