"""Fixtures of this package."""

import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
from trainer.models import networks, novelty
from trainer.serving import decoding
from trainer.serving.decoding import Decoders
from trainer.serving.saved_model import ParityReference

DECODE_TIMEOUT_SECS = 3.0  # the first image of a kind takes up to a second
NETWORK_INPUT = NetworkInput(image_size=32, resize="stretch", preprocessing="caffe")


@pytest.fixture(scope="session")
def reference():
    """A network of three classes and 32 pixels, and its probabilities for four noise images of different sizes."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([32, 32, 3])
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 5, activation="relu")(inputs))
    network = networks.with_head(keras.Model(inputs, features), 3)
    network.head.layers[-1].kernel.assign(network.head.layers[-1].kernel / 50)  # probabilities other than 0 and 1
    encoded = [_noise_image(size, size + 9, seed=size) for size in (20, 32, 50, 130)]
    images = tf.stack([decode_image(tf.constant(contents), NETWORK_INPUT) for contents in encoded])
    expected = network.model(preprocess(images, "caffe")).numpy()
    assert np.ptp(expected.max(axis=1)) > 0.01  # equal probabilities would hide a permutation of the images
    features = network.backbone(preprocess(images, "caffe")).numpy()
    known = novelty.fit(
        features[:3], features
    )  # the third nearest of three: all but equal features have a novelty above 0
    return ParityReference(network=network, encoded=encoded, images=images, expected=expected, novelty=known)


def _noise_image(height: int, width: int, seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="session")
def decoders():
    """Decoders of two images at a time, to squares of 32 pixels; `killed` has an item for each killed process."""
    decoding.start_importing()
    started = Decoders(
        32, "stretch", num_processes=2, timeout_secs=DECODE_TIMEOUT_SECS, on_kill=lambda: killed.append(None)
    )
    killed = started.killed = []
    started.start()
    yield started
    started.stop()
