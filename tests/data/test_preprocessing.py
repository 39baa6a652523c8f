"""Decoding, resizing, preprocessing and augmentation; test_decoders.py has the file formats."""

import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import corpus
from trainer.data.preprocessing import (
    NUM_AUGMENTATION_DRAWS,
    Augmentation,
    NetworkInput,
    augment,
    augmentation_draws,
    decode_image,
    preprocess,
)


def input_of(image_size: int) -> NetworkInput:
    return NetworkInput(image_size=image_size, resize="stretch", preprocessing="caffe")


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def pixels():
    """A smooth colorful image, uint8 [60, 90, 3]."""
    y, x = np.mgrid[0:60, 0:90]
    return np.stack([2 * x, 4 * y, 255 - x - y], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_a_lossless_image_of_the_right_size_is_not_changed(pixels, kind):
    square = pixels[:60, :60]
    np.testing.assert_array_equal(decode_image(tf.constant(encoded(square, kind)), input_of(60)), square)


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 3), ("JPEG", 8), ("GIF", 40)])
def test_every_format_is_resized_to_a_square(pixels, kind, tolerance):
    decoded = decode_image(tf.constant(encoded(pixels, kind)), input_of(48)).numpy()
    expected = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BILINEAR), int)
    assert decoded.shape == (48, 48, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded - expected).mean() < tolerance


def test_text_is_rejected():
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_image(tf.constant(b"text"), input_of(32))


@pytest.mark.parametrize("mode", ["caffe", "torch", "tf"])
def test_imagenet_preprocessing_is_that_of_keras(pixels, mode):
    theirs = keras.applications.imagenet_utils.preprocess_input(pixels[None].astype(np.float32), mode=mode)
    np.testing.assert_allclose(preprocess(tf.constant(pixels[None]), mode), theirs, atol=1e-4)


def test_an_unknown_preprocessing_is_an_error(pixels):
    with pytest.raises(ValueError, match="preprocessing is 'imagenet': pass rescale, caffe, torch or tf"):
        preprocess(tf.constant(pixels[None]), "imagenet")


def test_rescaling_is_that_of_the_article(pixels):
    np.testing.assert_allclose(preprocess(tf.constant(pixels[None]), "rescale"), pixels[None] / 255, atol=1e-6)


@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_augmentation_depends_on_the_draws_of_each_image_alone(pixels, strength):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    draws = rng.random((5, NUM_AUGMENTATION_DRAWS)).astype(np.float32)
    together = augment(tf.constant(images), tf.constant(draws), strength=strength).numpy()
    alone = np.concatenate(
        [augment(tf.constant(images[i : i + 1]), tf.constant(draws[i : i + 1]), strength=strength) for i in range(5)]
    )
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert together.min() >= 0
    assert together.max() <= 255
    assert np.abs(together - images).mean(axis=(1, 2, 3)).min() > 1


def test_neutral_draws_do_not_change_the_image(pixels):
    images = pixels[None, :48, :48]
    draws = np.full((1, NUM_AUGMENTATION_DRAWS), 0.5, np.float32)
    draws[0, 0] = 1.0  # all of the area
    np.testing.assert_allclose(augment(tf.constant(images), tf.constant(draws)), images, atol=1e-2)


def test_without_flips_left_stays_left():
    images = np.zeros((1, 32, 32, 3), np.uint8)
    images[:, :, :8] = 200
    draws = np.array([[1, 0.5, 0, 0, 0.1, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]], np.float32)  # the whole image, flipped
    for flips, bright in ((True, slice(24, 32)), (False, slice(0, 8))):
        result = augment(tf.constant(images), tf.constant(draws), flips=flips).numpy()
        np.testing.assert_allclose(result[:, :, bright], 200, atol=1)


def test_strong_augmentation_rotates_around_the_center_and_erases_a_square():
    images = np.zeros((1, 33, 33, 3), np.uint8)
    images[:, 16, :] = 240  # a horizontal line through the center
    neutral = np.array([[1, 0.5, 0, 0, 0.9, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]], np.float32)
    same = augment(tf.constant(images), tf.constant(neutral), strength="strong").numpy()
    np.testing.assert_allclose(same, images, atol=1)
    turned = neutral.copy()
    turned[:, 8] = 1.0  # by 15 degrees: 8 pixels from the center, the line is 8 * tan(15 degrees) = 2.1 pixels away
    rows = augment(tf.constant(images), tf.constant(turned), strength="strong").numpy()[0, :, :, 0]
    assert abs(int(rows[:, 16].argmax()) - 16) == 0
    assert abs(int(rows[:, 8].argmax()) - 16) == abs(int(rows[:, 24].argmax()) - 16) == 2
    erased = neutral.copy()
    erased[:, 9:] = [0.999, 0.0, 0.0]  # the upper left quarter, which then has the mean color
    result = augment(tf.constant(images), tf.constant(erased), strength="strong").numpy()
    np.testing.assert_allclose(result[0, :16, :16], images.mean(), atol=1.5)
    np.testing.assert_allclose(result[0, 18:, 18:], 0, atol=1)


def test_the_draws_of_basic_augmentation_do_not_depend_on_those_of_strong(pixels):
    draws = augmentation_draws(Augmentation(seed=3, epoch=2, strength="basic", flips=True), 6)
    expected = np.random.default_rng([3, 2, 1]).random((6, 8), np.float32)
    np.testing.assert_array_equal(draws[:, :8], expected)


def test_median_draws_keep_the_colors_and_extreme_ones_change_them():
    images = tf.constant(np.asarray(corpus.sample_image(48, 48))[None])
    whole = np.array([[1, 0.5, 0, 0, 0.9, 0.5, 0.5, 0.5, 0, 0, 0, 0]], np.float32)  # the whole image, not flipped
    np.testing.assert_allclose(augment(images, tf.constant(whole)), tf.cast(images, tf.float32), atol=0.01)
    for draw, measure in ((5, np.mean), (6, lambda x: (x.max(-1) - x.min(-1)).mean()), (7, np.std)):
        low, high = whole.copy(), whole.copy()
        low[:, draw], high[:, draw] = 0, 0.999
        results = [measure(augment(images, tf.constant(draws)).numpy()) for draws in (low, whole, high)]
        assert results[0] < results[1] < results[2]


@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_the_augmentation_of_an_image_does_not_depend_on_its_batch(strength):
    images = np.random.default_rng(0).integers(0, 256, (56, 8, 8, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    draws = augmentation_draws(Augmentation(seed=7, epoch=0, strength=strength, flips=True), len(images))

    def augment_in_batches(size: int) -> np.ndarray:
        augmented = [
            augment(tf.constant(images[i : i + size]), tf.constant(draws[i : i + size]), strength=strength)
            for i in range(0, len(images), size)
        ]
        return np.concatenate(augmented)

    whole = augment_in_batches(28)
    for size in (14, 7):
        np.testing.assert_array_equal(whole, augment_in_batches(size))
