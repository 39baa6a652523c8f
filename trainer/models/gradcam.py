"""Where in a picture the network saw what decided its label: Grad-CAM over the output of the last convolution.

Shapes: n pictures, S pixels to a side, [h, w, k] the last convolution's output (7, 7, 2048 of ResNet50 at 224 pixels),
C classes.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.data import shards
from trainer.data.preprocessing import decode_image, preprocess
from trainer.models.resnet import Network

_BATCH_SIZE = 12


class Explanation(NamedTuple):
    """What the network says, and where it saw that."""

    probabilities: tf.Tensor  # float32 [n, C]
    heatmaps: tf.Tensor  # float32 [n, h, w] in 0..1


def heatmaps(network: Network, pixels: tf.Tensor) -> tf.Tensor:
    """Float32 [n, h, w] in 0..1: how much each place spoke for the predicted class; `explain` tells how it is called."""
    return explain(network, pixels).heatmaps


def explain(network: Network, pixels: tf.Tensor) -> Explanation:
    """Probabilities float32 [n, C] and heat maps float32 [n, h, w] in 0..1, both of one forward pass.

        explain(network, image.preprocess(pictures, preprocessing))     # pictures uint8 [n, S, S, 3]

    `pixels` is float32 [n, S, S, 3], preprocessed. Many batches are to go through one tf.function around the call; it may
    be part of a SavedModel too, since nothing but TensorFlow operations comes out. To lay a map over its picture, resize
    it to the picture's own height and width: the network saw the whole picture squeezed to a square.

    Each map is 1 at its largest, and 0 where a place spoke for other classes; all 0 where none spoke for this one.
    It is Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391) without its mean of the gradient over the places (HiResCAM,
    Draelos and Carin, 2020, arXiv:2011.08891): with `--head=average` that is the same map, and with `--head=flatten`, whose
    weights differ from place to place, it stays the places' true shares of the logit.
    Raises ValueError if the backbone does not end in one layer over a convolution's output.
    """
    pooling = network.backbone.layers[-1]
    if len(pooling.input.shape) != 4:
        raise ValueError(
            f"The backbone ends in {pooling.name!r} over {pooling.input.shape}: Grad-CAM needs [n, h, w, k] there."
        )
    activations = keras.Model(network.backbone.input, pooling.input)(pixels, training=False)
    activations = tf.cast(activations, tf.float32)  # gradients of half precision would vanish
    with tf.GradientTape() as tape:
        tape.watch(activations)
        logits = network.head(pooling(activations), training=False)
        chosen = tf.reduce_max(logits, axis=1)
    heat = tf.nn.relu(tf.reduce_sum(tape.gradient(chosen, activations) * activations, axis=3))
    heat = tf.math.divide_no_nan(heat, tf.reduce_max(heat, axis=[1, 2], keepdims=True))
    return Explanation(tf.nn.softmax(logits), heat)


def of_files(
    network: Network, directory: str, paths: list[str], *, image_size: int, preprocessing: str
) -> dict[str, np.ndarray]:
    """The heat maps uint8 [h, w] of pictures of a data directory, by path; of those that can be read."""

    @tf.function(input_signature=[tf.TensorSpec([None, image_size, image_size, 3], tf.uint8)])
    def compute(images: tf.Tensor) -> tf.Tensor:
        return heatmaps(network, preprocess(images, preprocessing))

    images = {}
    for path in dict.fromkeys(paths):
        contents = shards.read(directory, path)
        try:
            images[path] = decode_image(tf.constant(contents or b""), image_size)
        except tf.errors.InvalidArgumentError:  # gone, or damaged, since
            continue
    names = list(images)
    maps: dict[str, np.ndarray] = {}
    for start in range(0, len(names), _BATCH_SIZE):
        batch = names[start : start + _BATCH_SIZE]
        heat = compute(tf.stack([images[name] for name in batch])).numpy()  # [n, h, w]
        maps |= dict(zip(batch, np.round(255 * heat).astype(np.uint8), strict=True))
    return maps
