"""A SavedModel of a small network, as trainer.task exports one, made in seconds. Not a test itself.

It tells apart what is mostly red, green or blue, surely, so that a test knows the answer.
"""

import io
import pathlib

import numpy as np
from PIL import Image

from trainer.data.preprocessing import decode_image, preprocess

CLASS_NAMES = ("<b>red & hot</b>", "grün", "blue")
COLOURS = ((220, 20, 20), (20, 220, 20), (20, 20, 220))


def make_image(index: int, *, height: int = 90, width: int = 120, kind: str = "JPEG", seed: int = 0) -> bytes:
    """A noisy picture of class `index`, as the bytes of a file."""
    noise = np.random.default_rng(seed).normal(0, 25, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(COLOURS[index] + noise, 0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def save(directory: pathlib.Path) -> pathlib.Path:
    """Exports it into the folder, through the gate of every export."""
    import keras
    import tensorflow as tf

    from trainer.models import resnet
    from trainer.serving import saved_model

    inputs = keras.Input([32, 32, 3])
    convolution = keras.layers.Conv2D(3, 4, strides=4, use_bias=False, activation="relu")
    network = resnet.with_head(
        keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(convolution(inputs))), len(CLASS_NAMES)
    )
    convolution.set_weights([np.eye(3, dtype=np.float32)[None, None] * np.ones([4, 4, 1, 1], np.float32) / 16])
    network.head.layers[-1].set_weights([np.eye(3, dtype=np.float32) * 5, np.zeros(3, np.float32)])
    samples = [make_image(i, seed=i) for i in range(3)]
    images = tf.stack([decode_image(tf.constant(sample), 32) for sample in samples])
    saved_model.save(
        str(directory),
        network,
        class_names=CLASS_NAMES,
        image_size=32,
        preprocessing="rescale",
        samples=samples,
        images=images,
        expected=network.model(preprocess(images, "rescale")).numpy(),
    )
    return directory
