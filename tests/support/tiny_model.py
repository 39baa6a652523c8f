"""A small network that classifies images by their color, exported as trainer.task does, in seconds.

Its probabilities are close to 0 or 1, so that a test knows the label of each image.
"""

import io
import pathlib

import numpy as np
from PIL import Image

from trainer.data.preprocessing import NetworkInput, decode_image, preprocess

CLASS_NAMES = ("<b>red & hot</b>", "grün", "blue")
COLORS = ((220, 20, 20), (20, 220, 20), (20, 20, 220), (120, 120, 120))  # the last is that of no class
IMAGE_SIZE = 32
NETWORK_INPUT = NetworkInput(image_size=IMAGE_SIZE, resize="stretch", preprocessing="rescale")


def make_image(index: int, *, height: int = 90, width: int = 120, kind: str = "JPEG", seed: int = 0) -> bytes:
    """A noisy image of class `index`, or of no class (3), as the contents of a file."""
    noise = np.random.default_rng(seed).normal(0, 25, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(COLORS[index] + noise, 0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def save(directory: pathlib.Path) -> pathlib.Path:
    """Exports the network into the folder, with the parity check."""
    import keras
    import tensorflow as tf

    from trainer.models import networks, novelty
    from trainer.serving import saved_model
    from trainer.serving.saved_model import ParityReference

    inputs = keras.Input([IMAGE_SIZE, IMAGE_SIZE, 3])
    convolution = keras.layers.Conv2D(3, 4, strides=4, use_bias=False, activation="relu")
    features = keras.layers.GlobalAveragePooling2D()(convolution(inputs))
    network = networks.with_head(keras.Model(inputs, features), len(CLASS_NAMES))
    convolution.set_weights([np.eye(3, dtype=np.float32)[None, None] * np.ones([4, 4, 1, 1], np.float32) / 16])
    network.head.layers[-1].set_weights([np.eye(3, dtype=np.float32) * 5, np.zeros(3, np.float32)])
    encoded = [make_image(i, seed=i) for i in range(3)]
    images = tf.stack([decode_image(tf.constant(contents), NETWORK_INPUT) for contents in encoded])
    expected = network.model(preprocess(images, NETWORK_INPUT.preprocessing)).numpy()
    features = network.backbone(preprocess(images, NETWORK_INPUT.preprocessing)).numpy()
    known = novelty.fit(np.repeat(features, 3, axis=0), features)
    saved_model.save(
        str(directory),
        ParityReference(network=network, encoded=encoded, images=images, expected=expected, novelty=known),
        class_names=CLASS_NAMES,
        network_input=NETWORK_INPUT,
    )
    return directory
