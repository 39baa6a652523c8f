"""Each backbone is the one in the table, without random layers, with the preprocessing of its ImageNet weights."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer import config
from trainer.config import Config
from trainer.data.preprocessing import preprocess
from trainer.errors import UserError
from trainer.models import backbones, gradcam, networks
from trainer.models.backbones import BACKBONES
from trainer.serving import converters, saved_model
from trainer.serving.saved_model import ParityReference

NAMES = sorted(BACKBONES)
# As keras.applications documents them: with preprocessing inside, where there is any.
WITH_PREPROCESSING = {
    "EfficientNetV2B0": keras.applications.EfficientNetV2B0,
    "ConvNeXtTiny": keras.applications.ConvNeXtTiny,
    "MobileNetV3Large": keras.applications.MobileNetV3Large,
}


@functools.cache
def built(name: str) -> networks.Network:
    return networks.build(
        num_classes=3, image_size=64, backbone=name, weights="none", head="average", precision="float32", seed=0
    )


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3)).astype(np.uint8)


def input_of(name: str, preprocessing: str = "imagenet"):
    return backbones.input_from_flags(Config(backbone=name, image_size=64, preprocessing=preprocessing).as_dict())


def test_the_table_has_each_choice_of_the_flag():
    assert sorted(config.FLAG_INFO["backbone"].choices) == NAMES


def test_flags_from_before_resize_and_backbone_are_those_of_resnet50_on_stretched_images():
    network_input = backbones.input_from_flags({"image_size": 224, "preprocessing": "imagenet"})
    assert network_input == input_of("ResNet50").__class__(224, "stretch", "caffe")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_parameters_and_features_of_the_network(name):
    network = built(name)
    assert network.backbone.count_params() == BACKBONES[name].parameters
    assert network.backbone.output_shape == (None, BACKBONES[name].features_per_cell)
    assert not [variable.path for variable in network.model.variables if "seed" in variable.path]
    for size in (63, 65):
        base = backbones.create(name, image_size=size, weights=None)
        assert base.output_shape[1] * base.output_shape[2] == BACKBONES[name].num_cells(size)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_is_a_function_of_weights_and_images_alone(name):
    """Nothing in the backbone is random, so a step after a resume, or on another replica, is the same."""
    images = preprocess(noise(4), input_of(name).preprocessing)
    features = tf.function(lambda x: built(name).backbone(x, training=True))
    np.testing.assert_array_equal(features(images), features(images))
    norms = [layer for layer in built(name).backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert all(layer.momentum == 0.9 and layer.synchronized for layer in norms)
    assert len(norms) == {"ConvNeXtTiny": 0, "EfficientNetV2B0": 59, "MobileNetV3Large": 46}.get(name, len(norms))


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_PREPROCESSING)
def test_imagenet_preprocessing_is_that_inside_the_network_of_keras(name):
    keras.utils.set_random_seed(1)
    theirs = WITH_PREPROCESSING[name](weights=None, include_top=False, input_shape=(64, 64, 3))
    ours = backbones.create(name, image_size=64, weights=None)
    ours.set_weights(theirs.get_weights())
    images = noise(2)
    expected = theirs(images.astype(np.float32), training=False).numpy()
    actual = ours(preprocess(images, input_of(name).preprocessing), training=False).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_PREPROCESSING)
def test_weights_that_keras_saved_fit_and_others_name_the_first_layer(name, tmp_path):
    path, other = (
        str(tmp_path / "w.weights.h5"),
        "MobileNetV3Large" if name != "MobileNetV3Large" else "EfficientNetV2B0",
    )
    keras.layers.LayerNormalization()  # a later automatic name than in the process that wrote the file
    theirs = WITH_PREPROCESSING[name](weights=None, include_top=False, input_shape=(64, 64, 3))
    theirs.save_weights(path)
    build = functools.partial(
        networks.build, num_classes=2, image_size=64, weights=path, head="average", precision="float32", seed=3
    )
    loaded = build(backbone=name).backbone
    for expected, actual in zip(theirs.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)
    with pytest.raises(
        UserError, match=r"--weights=.* does not fit the network: layer '\w+' has shapes .* the file has"
    ):
        build(backbone=other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "formats"),
    [("EfficientNetV2B0", []), ("ConvNeXtTiny", []), ("MobileNetV3Large", ["tflite", "onnx"])],
)
def test_every_export_passes_the_parity_check_and_has_heat_maps(name, formats, tmp_path):
    network, network_input = built(name), input_of(name)
    images = tf.constant(np.stack([noise(1)[0], np.full([64, 64, 3], (250, 20, 120), np.uint8)]))
    preprocessed = preprocess(images, network_input.preprocessing)
    # Random weights give all images almost the same features. Statistics of these images spread them, a factor the logits.
    update_statistics = tf.function(lambda: network.backbone(preprocessed, training=True))
    for _ in range(50):
        update_statistics()
    kernel, bias = network.head.layers[-1].weights
    logits = network.head(network.backbone(preprocessed, training=False)).numpy()
    scale = 2 / np.ptp(logits, axis=0).max()
    kernel.assign(kernel * scale)
    bias.assign(-scale * logits.mean(axis=0))
    expected = network.model(preprocessed, training=False).numpy()
    assert np.ptp(expected, axis=0).max() > 0.1
    encoded = [tf.io.encode_png(image).numpy() for image in images]
    reference = ParityReference(network=network, encoded=encoded, images=images, expected=expected)
    exported = {"class_names": ("a", "b", "c"), "network_input": network_input}
    exports = {"saved_model": saved_model.save(str(tmp_path / "m"), reference, **exported)}
    exports |= converters.write(str(tmp_path / "e"), formats, reference, **exported)
    assert max(export.max_difference for export in exports.values()) < 1e-4
    heat = gradcam.heatmaps(network, preprocessed)
    assert heat.shape == (2, 2, 2)
    assert np.isfinite(heat).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), zip(WITH_PREPROCESSING, ["mixed_bfloat16", "mixed_float16", "mixed_float16"], strict=True)
)
def test_half_precision_gives_finite_float32_features_and_frozen_statistics(name, precision):
    network = networks.build(
        num_classes=3,
        image_size=32,
        backbone=name,
        weights="none",
        head="average",
        precision=precision,
        seed=0,
        batch_norm="frozen",
    )
    computing = [
        layer for layer in network.backbone.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense)
    ]
    assert {layer.compute_dtype for layer in computing} == {precision.removeprefix("mixed_")}
    images = noise(2)[:, :32, :32] / 127.5 - 1
    features = network.backbone(images)
    assert networks.input_dtype(network.backbone) == precision.removeprefix("mixed_")
    np.testing.assert_array_equal(network.backbone(tf.cast(images, precision.removeprefix("mixed_"))), features)
    assert features.dtype == tf.float32
    assert np.isfinite(features).all()
    norms = [layer for layer in network.backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert not any(layer.trainable for layer in norms)
