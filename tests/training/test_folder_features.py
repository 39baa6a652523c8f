"""Features of a folder are those of the Keras network, computed without batch normalization."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support.images import write_images
from trainer.config import Config
from trainer.data.dataset import read_folder
from trainer.data.preprocessing import decode_image, preprocess
from trainer.models import backbones, networks
from trainer.training import folder_features


@pytest.mark.slow
def test_features_are_those_of_the_network_without_batch_normalization(tmp_path, monkeypatch):
    network = networks.build(
        num_classes=2,
        image_size=32,
        backbone="MobileNetV3Large",
        weights="none",
        head="average",
        precision="float32",
        seed=0,
    )
    weights = str(tmp_path / "w.weights.h5")
    network.model.save_weights(weights)
    folder = write_images(tmp_path / "images", {"a": 3, "b": 2})
    examples = read_folder(str(folder)).examples
    settings = Config(weights=weights, backbone="MobileNetV3Large", image_size=32, precision="float32")

    def fail(layer, inputs, training=None, mask=None):
        raise AssertionError("batch normalization was computed")

    with monkeypatch.context() as patch:
        patch.setattr(keras.layers.BatchNormalization, "call", fail)
        features = folder_features.compute(str(folder), examples, ("a", "b"), settings)
    assert features.is_readable.all()
    network_input = backbones.input_from_flags(settings.as_dict())
    contents = [tf.constant((folder / path).read_bytes()) for path in examples.paths]
    images = tf.stack([decode_image(content, network_input) for content in contents])
    expected = network.backbone(preprocess(images, network_input.preprocessing), training=False).numpy()
    np.testing.assert_allclose(features.values, expected, atol=1e-4 * np.abs(expected).max())
