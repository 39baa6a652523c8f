"""The three ways in which an image becomes a square, for files of any proportions and orientation."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tests.support import corpus
from trainer.data import input_pipeline
from trainer.data.input_pipeline import FileSource
from trainer.data.preprocessing import PAD_COLOR, NetworkInput, decode_image, resize

SIZE = 48
RESIZES = ("stretch", "pad", "crop")
# Width and height: one pixel, one row, one column, odd and even differences, reduced by the decoder or not.
SIZES = [
    (1, 1),
    (1, 300),
    (300, 1),
    (2, 3),
    (48, 47),
    (49, 48),
    (200, 37),
    (37, 200),
    (400, 100),
    (101, 400),
    (640, 427),
]


def input_of(name: str, size: int = SIZE) -> NetworkInput:
    return NetworkInput(image_size=size, resize=name, preprocessing="caffe")


def decode(image: Image.Image, name: str, file_format: str = "PNG", *, size: int = SIZE, **options) -> np.ndarray:
    return decode_image(tf.constant(corpus.encode(image, file_format, **options)), input_of(name, size)).numpy()


@pytest.mark.parametrize("size", [48, 49])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (480, 120), (120, 481)])
def test_pad_and_crop_are_those_of_pillow(shape, size):
    image = corpus.sample_image(*shape)
    cropped = ImageOps.fit(
        image, (size, size), Image.Resampling.BOX if min(shape) > 2 * size else Image.Resampling.BILINEAR
    )
    padded = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=PAD_COLOR)
    assert np.abs(decode(image, "crop", size=size).astype(int) - np.asarray(cropped)).mean() < 4
    assert np.abs(decode(image, "pad", size=size).astype(int) - np.asarray(padded)).mean() < 6


@pytest.mark.parametrize("shape", SIZES)
def test_margins_are_equal_and_of_one_color_and_some_image_remains(shape):
    padded = decode(Image.new("RGB", shape, "red"), "pad")
    is_margin = (padded == PAD_COLOR).all(axis=-1)
    assert (padded[~is_margin] == (255, 0, 0)).all()
    rows, columns = np.flatnonzero(~is_margin.all(axis=1)), np.flatnonzero(~is_margin.all(axis=0))
    for kept, side in ((rows, shape[1]), (columns, shape[0])):
        assert kept[0] == SIZE - 1 - kept[-1]
        assert len(kept) == pytest.approx(max(SIZE * side / max(shape), 2), abs=1)


@pytest.mark.parametrize("name", RESIZES)
@pytest.mark.parametrize("shape", SIZES)
def test_the_orientation_in_a_file_and_rotated_pixels_give_the_same_image(shape, name):
    image = corpus.sample_image(*shape)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(corpus.encode(image, "PNG", exif=exif))))
        difference = decode(image, name, exif=exif).astype(int) - decode(upright, name)
        assert np.abs(difference).max() <= 1, orientation  # sums in another order may round differently


@pytest.mark.parametrize("name", RESIZES)
def test_a_square_image_is_the_same_in_each_way(name):
    image = corpus.sample_image(130, 130)
    np.testing.assert_array_equal(decode(image, name, "JPEG"), decode(image, "stretch", "JPEG"))


@pytest.mark.parametrize(("name", "shape", "ratio"), [
    ("stretch", (1600, 200), 4), ("crop", (1600, 200), 4), ("pad", (1600, 200), 8), ("pad", (200, 1600), 8),
    ("pad", (95, 40), 1), ("pad", (96, 40), 2), ("crop", (96, 95), 1),
])  # fmt: skip
def test_a_jpeg_is_decoded_at_the_smallest_size_that_is_enough(name, shape, ratio):
    """At `ratio`, and resized from there: equal to the same steps one by one."""
    contents = tf.constant(corpus.encode(corpus.sample_image(*shape), "JPEG"))
    pixels = tf.io.decode_jpeg(contents, ratio=ratio)
    expected = resize(pixels, input_of(name), is_reduced=ratio > 1)
    np.testing.assert_array_equal(decode_image(contents, input_of(name)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIZES)
def test_the_input_pipeline_a_saved_model_and_batches_of_pixels_give_the_same_images(tmp_path, name):
    network_input = input_of(name)
    encoded = []
    for index, shape in enumerate(SIZES):
        exif = Image.Exif()
        exif[0x0112] = index % 8 + 1
        encoded += [corpus.encode(corpus.sample_image(*shape), kind, exif=exif) for kind in ("PNG", "JPEG")]
    paths = [f"{index:02d}" for index in range(len(encoded))]
    for path, contents in zip(paths, encoded, strict=True):
        (tmp_path / path).write_bytes(contents)
    source = FileSource(str(tmp_path), np.array(paths, object), network_input, on_unreadable=print)
    trained = input_pipeline.decode_all(source, "", lambda count: None)
    assert trained.is_readable.numpy().all()

    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def serve(contents):
        return tf.map_fn(lambda one: decode_image(one, network_input), contents, fn_output_signature=tf.uint8)

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)])
    def serve_pixels(pixels):
        return resize(pixels, network_input)

    module.serve, module.serve_pixels = serve, serve_pixels
    tf.saved_model.save(module, str(tmp_path / "model"))
    served = tf.saved_model.load(str(tmp_path / "model"))
    np.testing.assert_array_equal(served.serve(tf.constant(encoded)), trained.values)
    for index in range(0, len(encoded), 2):  # PNG: lossless, and not decoded at a reduced size
        pixels = corpus.as_seen(encoded[index])
        batch = served.serve_pixels(tf.constant(np.stack([pixels, pixels]))).numpy().astype(int)
        assert np.abs(batch - trained.values[index].numpy()).max() <= 1
