"""Heat maps of a network whose decisive regions are known."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import corpus
from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
from trainer.models import gradcam, networks, novelty
from trainer.reporting import thumbnails

SIZE, CELLS = 32, 8  # height and width of an image in pixels, and of the convolution's output
RED, BLUE = (250, 0, 0), (0, 0, 250)


def make_network(head: str, precision: str = "float32") -> networks.Network:
    """Class 0 is red, class 1 is blue. The convolution has one channel for each."""
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input([SIZE, SIZE, 3])
    x = keras.layers.Conv2D(2, 4, strides=4, use_bias=False, activation="relu", name="convolution")(inputs)
    keras.config.set_dtype_policy("float32")
    pooling = keras.layers.GlobalAveragePooling2D if head == "average" else keras.layers.Flatten
    network = networks.with_head(keras.Model(inputs, pooling(dtype="float32", name="features")(x)), 2)
    kernel = np.zeros([4, 4, 3, 2], np.float32)
    kernel[:, :, 0, 0] = kernel[:, :, 2, 1] = 1 / 16
    network.backbone.get_layer("convolution").set_weights([kernel])
    weights = np.tile(np.array([[1, -1], [-1, 1]], np.float32), (network.head.input_shape[-1] // 2, 1))
    network.head.layers[-1].set_weights([weights, np.zeros(2, np.float32)])
    return network


def make_pixels(patches: dict[tuple[int, int], tuple[int, int, int]]) -> np.ndarray:
    """A dark float32 [1, S, S, 3] with patches of 8 x 8 pixels, by the row and column of their first cell."""
    pixels = np.full([1, SIZE, SIZE, 3], 5, np.float32)
    for (row, column), color in patches.items():
        pixels[0, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8] = color
    return pixels


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("head", ["average", "flatten"])
def test_only_regions_of_the_predicted_class_are_hot(head, precision):
    network = make_network(head, precision)
    # Two red patches and one blue: red is predicted, and the red patches are the reason.
    pixels = make_pixels({(0, 1): RED, (5, 6): RED, (2, 4): BLUE})
    probabilities, heat, features = gradcam.explain(network, pixels)
    np.testing.assert_allclose(features, novelty.pool(network, network.backbone(pixels)), rtol=2e-2)
    assert probabilities.dtype == heat.dtype == tf.float32
    np.testing.assert_allclose(probabilities, network.model(pixels), atol=1e-3)
    assert heat.shape == (1, CELLS, CELLS)
    is_red = np.zeros([CELLS, CELLS], bool)
    is_red[0:2, 1:3] = is_red[5:7, 6:8] = True
    np.testing.assert_allclose(heat[0].numpy()[is_red], 1, atol=0.01)
    assert heat.numpy()[0][~is_red].max() < 0.05


def test_regions_that_a_flatten_head_ignores_are_cold():
    network = make_network("flatten")
    weights = network.head.layers[-1].get_weights()[0].reshape(CELLS, CELLS, 2, 2)
    weights[:, CELLS // 2 :] = 0
    network.head.layers[-1].set_weights([weights.reshape(-1, 2), np.zeros(2, np.float32)])
    heat = gradcam.heatmaps(network, make_pixels({(3, 1): RED, (3, 5): RED})).numpy()[0]
    assert heat[3:5, 1:3].min() == 1
    assert heat[:, CELLS // 2 :].max() == 0


def test_an_image_without_evidence_has_a_map_of_zeros():
    heat = gradcam.heatmaps(make_network("average"), np.zeros([2, SIZE, SIZE, 3], np.float32))
    assert heat.numpy().max() == 0


def test_a_saved_model_gives_each_image_of_a_batch_its_own_map(tmp_path):
    network = make_network("average")
    pixels = np.concatenate([make_pixels({(0, 0): RED}), make_pixels({(6, 6): BLUE}), make_pixels({(2, 5): RED})])
    module = tf.Module()
    module.weights = [variable.value for variable in network.model.variables]
    module.heatmaps = tf.function(lambda pixels: gradcam.heatmaps(network, pixels)).get_concrete_function(
        tf.TensorSpec([None, SIZE, SIZE, 3])
    )
    tf.saved_model.save(module, str(tmp_path))
    served = tf.saved_model.load(str(tmp_path)).heatmaps(tf.constant(pixels)).numpy()
    np.testing.assert_allclose(served, gradcam.heatmaps(network, pixels), atol=1e-6)
    assert [np.unravel_index(heat.argmax(), heat.shape) for heat in served] == [(0, 0), (6, 6), (2, 5)]


@pytest.mark.parametrize("resize", ["stretch", "pad", "crop"])
@pytest.mark.parametrize(("shape", "patch"), [
    ((160, 40), (64, 8, 80, 24)), ((40, 160), (8, 80, 24, 96)), ((96, 80), (48, 24, 64, 40)), ((64, 64), (8, 40, 24, 56)),
])  # fmt: skip
def test_a_map_over_the_image_is_hot_where_the_evidence_is(resize, shape, patch):
    image = Image.new("RGB", shape, (5, 5, 5))
    image.paste(RED, patch)
    network_input = NetworkInput(image_size=SIZE, resize=resize, preprocessing="rescale")
    pixels = decode_image(tf.constant(corpus.encode(image, "PNG")), network_input)
    heat = gradcam.heatmaps(make_network("flatten"), preprocess(pixels[None], "rescale")).numpy()[0]
    over = np.asarray(thumbnails.over_image(Image.fromarray((255 * heat).astype(np.uint8)), shape, resize), float)
    assert over.shape == shape[::-1]
    y, x = np.mgrid[: shape[1], : shape[0]] + 0.5
    center = (over * x).sum() / over.sum(), (over * y).sum() / over.sum()
    cell = max(shape) / CELLS  # pixels of the image
    assert center == pytest.approx(((patch[0] + patch[2]) / 2, (patch[1] + patch[3]) / 2), abs=cell / 2)


def test_what_crop_leaves_out_is_cold():
    heat = Image.new("L", (CELLS, CELLS), 255)
    over = np.asarray(thumbnails.over_image(heat, (160, 40), "crop"))
    assert over[:, 60:100].min() == 255
    assert over[:, :60].max() == over[:, 100:].max() == 0


def test_files_that_cannot_be_read_have_no_map(tmp_path):
    network, paths = make_network("average"), [f"{i:02d}.png" for i in range(14)]  # more than one batch
    for i, path in enumerate(paths):
        pixels = make_pixels({(i % 7, 3): RED})[0].astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / path)
    (tmp_path / paths[1]).write_bytes(b"damaged")
    (tmp_path / paths[2]).unlink()
    network_input = NetworkInput(image_size=SIZE, resize="stretch", preprocessing="rescale")
    maps = gradcam.of_files(network, str(tmp_path), [*paths, paths[0]], network_input=network_input)
    assert list(maps) == [paths[0], *paths[3:]]
    image = decode_image(tf.constant((tmp_path / paths[5]).read_bytes()), network_input)
    expected = gradcam.heatmaps(network, preprocess(image[None], "rescale")).numpy()[0]
    np.testing.assert_array_equal(maps[paths[5]], np.round(255 * expected).astype(np.uint8))


def test_a_backbone_without_a_convolution_is_an_error():
    inputs = keras.Input([6])
    network = networks.with_head(keras.Model(inputs, keras.layers.Dense(4)(inputs)), 2)
    with pytest.raises(ValueError, match="needs \\[B, h, w, k\\]"):
        gradcam.explain(network, np.zeros([1, 6], np.float32))
