"""A folded network computes what the Keras network computes, without batch normalization."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.paths import WEIGHTS
from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
from trainer.models import folded, gradcam, networks

LAYERS = keras.layers


def randomize_statistics(backbone: keras.Model) -> None:
    """Statistics, scales and offsets as training would leave them; Keras begins with 0 and 1."""
    rng = np.random.default_rng(0)
    for layer in norms(backbone):
        for variable in layer.weights:
            spread = rng.uniform(0.5, 2, variable.shape)
            variable.assign(spread if variable.name in ("gamma", "moving_variance") else spread - 1)


def norms(backbone: keras.Model) -> list[keras.layers.BatchNormalization]:
    return [layer for layer in backbone.layers if isinstance(layer, LAYERS.BatchNormalization)]


def make_backbone(precision: str = "float32") -> keras.Model:
    """Eight normalizations, of which the last three cannot be folded; the features are float32."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    inputs = keras.Input([16, 16, 3])
    x = LAYERS.Conv2D(8, 3, strides=2, use_bias=False)(LAYERS.ZeroPadding2D()(inputs))
    x = LAYERS.ReLU()(LAYERS.BatchNormalization(epsilon=1e-5)(x))
    x = LAYERS.Conv2D(8, 3, padding="same", groups=2, bias_initializer="ones")(x)
    shortcut = LAYERS.BatchNormalization(scale=False)(x)
    x = LAYERS.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False)(shortcut)
    x = LAYERS.Activation("hard_swish")(LAYERS.BatchNormalization(center=False)(x))
    x = LAYERS.BatchNormalization()(LAYERS.Conv2D(8, 1, bias_initializer="ones")(x))
    x = LAYERS.BatchNormalization()(LAYERS.Conv2D(8, 3, padding="same", dilation_rate=2)(LAYERS.Add()([x, shortcut])))
    of_activation = LAYERS.BatchNormalization(name="of_activation")(LAYERS.Conv2D(8, 1, activation="relu")(x))
    used_twice = LAYERS.Conv2D(8, 1)(x)
    x = LAYERS.Add()([LAYERS.BatchNormalization(name="of_shared")(used_twice), used_twice, of_activation])
    x = LAYERS.BatchNormalization(name="of_sum")(x)
    features = LAYERS.GlobalAveragePooling2D(dtype="float32", name="features")(x * 0.5)
    keras.config.set_dtype_policy("float32")
    backbone = keras.Model(inputs, features, name="backbone")
    randomize_statistics(backbone)
    return backbone


def noise(size: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).normal(size=[count, size, size, 3]).astype(np.float32)


def relative_difference(actual: tf.Tensor, expected: tf.Tensor) -> float:
    return float(np.abs(np.subtract(actual, expected)).max() / np.abs(expected).max())


def test_every_normalization_after_a_convolution_is_folded_and_the_features_stay():
    backbone = make_backbone()
    before = backbone.get_weights()
    inference = folded.fold(backbone)
    assert {layer.name for layer in norms(inference)} == {"of_activation", "of_shared", "of_sum"}
    expected = backbone(noise(16), training=False)
    assert relative_difference(inference(noise(16), training=False), expected) < 1e-6
    assert not inference.trainable_variables
    for value, unchanged in zip(backbone.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, unchanged)
    assert backbone.layers[-1].input.shape == (None, 8, 8, 8)  # of one call: Grad-CAM needs it


def test_refresh_takes_the_weights_of_the_network_as_it_is_now():
    backbone = make_backbone()
    inference = folded.fold(backbone)
    backbone.set_weights([value + 0.1 for value in backbone.get_weights()])
    expected = backbone(noise(16), training=False)
    assert relative_difference(inference(noise(16), training=False), expected) > 1e-2
    folded.refresh(inference, backbone)
    assert relative_difference(inference(noise(16), training=False), expected) < 1e-6


def freeze(backbone: keras.Model) -> keras.Model:
    for norm in norms(backbone):
        norm.trainable = False
    return backbone


def loss_and_gradients(forward, variables: list) -> tuple[tf.Tensor, list[tf.Tensor]]:
    with tf.GradientTape() as tape:
        features = forward(tf.constant(noise(16)))
        loss = tf.reduce_sum(features * tf.range(1.0, 9.0))
    return features, tape.gradient(loss, [variable.value for variable in variables])


def test_training_with_frozen_statistics_has_the_features_and_gradients_of_the_network():
    backbone = freeze(make_backbone())
    forward = folded.training_forward(folded.fold(backbone), backbone)
    backbone.set_weights([value + 0.1 for value in backbone.get_weights()])  # the present weights count
    expected = loss_and_gradients(lambda x: backbone(x, training=True), backbone.trainable_variables)
    actual = loss_and_gradients(tf.function(forward, autograph=False), backbone.trainable_variables)
    assert len(expected[1]) == 12  # the kernels of seven convolutions, the biases of five
    assert relative_difference(actual[0], expected[0]) < 1e-6
    for one, other in zip(actual[1], expected[1], strict=True):
        assert relative_difference(one, other) < 1e-5


def test_training_is_folded_only_where_it_computes_what_inference_does():
    backbone = make_backbone()
    assert folded.training_forward(folded.fold(backbone), backbone) is None  # batch statistics
    freeze(backbone)
    dropout = LAYERS.Dropout(0.5)(backbone.output)
    draws = keras.Model(backbone.input, dropout)
    assert folded.training_forward(folded.fold(draws), draws) is None
    without = keras.Model(backbone.input, LAYERS.GlobalAveragePooling2D()(backbone.input))
    assert folded.training_forward(folded.fold(without), without) is None  # nothing to fold


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_precision_is_that_of_the_layers_or_the_given_one(dtype):
    mixed = make_backbone(f"mixed_{dtype}")
    assert mixed.compute_dtype == "float32"  # which is not the precision of its layers
    for inference in (folded.fold(mixed), folded.fold(make_backbone(), dtype)):
        assert {layer.compute_dtype for layer in inference.layers[1:-1]} == {dtype}
        assert {variable.dtype for variable in inference.variables} == {"float32"}  # workers cannot exchange bfloat16
        features = inference(noise(16), training=False)
        assert features.dtype == tf.float32
        assert relative_difference(features, make_backbone()(noise(16), training=False)) < 0.05
    assert {layer.compute_dtype for layer in folded.fold(mixed, "float32").layers} == {"float32"}


def test_a_backbone_without_such_a_normalization_is_used_as_it_is():
    inputs = keras.Input([16, 16, 3])
    features = LAYERS.GlobalAveragePooling2D()(LAYERS.LayerNormalization()(LAYERS.Conv2D(4, 3)(inputs)))
    network = networks.with_head(keras.Model(inputs, features), 2)
    assert folded.fold_network(network) is network
    half = folded.fold_network(network, "bfloat16").backbone
    assert {layer.compute_dtype for layer in half.layers[1:-1]} == {"bfloat16"}
    assert relative_difference(half(noise(16)), network.backbone(noise(16))) < 0.02


def test_a_folded_network_has_the_probabilities_and_heat_maps_of_the_network():
    network = networks.with_head(make_backbone(), 3)
    inference = folded.fold_network(network)
    assert inference.head is network.head
    np.testing.assert_allclose(inference.model(noise(16)), network.model(noise(16), training=False), atol=1e-6)
    for actual, expected in zip(
        gradcam.explain(inference, noise(16)), gradcam.explain(network, noise(16)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EfficientNetV2B0", "MobileNetV3Large"])
def test_backbones_with_depthwise_convolutions_are_folded_completely(name):
    # In float64: with random weights and statistics, rounding errors of float32 grow from block to block.
    backbone = networks.build(
        num_classes=2, image_size=32, backbone=name, weights="none", head="average", precision="float64", seed=0
    ).backbone
    randomize_statistics(backbone)
    inference = folded.fold(backbone)
    assert norms(backbone)
    assert not norms(inference)
    expected = backbone(noise(32), training=False)
    assert relative_difference(inference(noise(32), training=False), expected) < 1e-6


@pytest.mark.slow
def test_resnet50_is_as_exact_as_keras_in_float32_and_in_bfloat16(shared, monkeypatch):
    def build(precision: str) -> keras.Model:
        return networks.build(
            num_classes=2,
            image_size=64,
            backbone="ResNet50",
            weights=str(WEIGHTS),
            head="average",
            precision=precision,
            seed=0,
        ).backbone

    paths = sorted((shared / "data" / "cats_and_dogs").rglob("*.jpg"))[::200]
    network_input = NetworkInput(image_size=64, resize="stretch", preprocessing="caffe")
    images = tf.stack([decode_image(tf.constant(path.read_bytes()), network_input) for path in paths])
    assert len(images) >= 8
    pixels = preprocess(images, "caffe")
    exact, half = build("float32"), build("mixed_bfloat16")
    expected = exact(pixels, training=False).numpy()
    inference = folded.fold(exact)
    assert not norms(inference)
    assert relative_difference(inference(pixels, training=False), expected) < 1e-5

    def error(backbone: keras.Model) -> float:
        return np.abs(backbone(pixels, training=False) - expected).mean()

    inference = folded.fold(half)
    keras_error = error(half)
    assert error(inference) <= 1.1 * keras_error  # rounds after the convolution and after the bias

    def convolution_that_rounds_once(layer: LAYERS.Conv2D, inputs: tf.Tensor) -> tf.Tensor:
        """As processors with bfloat16 compute it, which this one may not be."""
        inputs, kernel, bias = (tf.cast(value, tf.float32) for value in (inputs, layer.kernel, layer.bias))
        return tf.cast(layer.convolution_op(inputs, kernel) + bias, layer.compute_dtype)

    monkeypatch.setattr(LAYERS.Conv2D, "call", convolution_that_rounds_once)
    assert error(inference) <= keras_error
