"""Which regions of an image decide its predicted class: Grad-CAM on the output of the last convolution.

Shapes: B images, S pixels to a side, [h, w, k] the output of the last convolution ([7, 7, 2048] of ResNet50 at 224
pixels), C classes.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainer.data import shards
from trainer.data.preprocessing import NetworkInput, decode_image, preprocess
from trainer.models.networks import Network

_BATCH_SIZE = 12


class Explanation(NamedTuple):  # not a dataclass, which a tf.function cannot return
    """Predictions and their heat maps."""

    probabilities: tf.Tensor  # float32 [B, C]
    heatmaps: tf.Tensor  # float32 [B, h, w] in 0..1
    features: tf.Tensor  # float32 [B, k], the mean over the regions


def heatmaps(network: Network, pixels: tf.Tensor) -> tf.Tensor:
    """Heat maps float32 [B, h, w] in 0..1 of the predicted classes; see `explain`."""
    return explain(network, pixels).heatmaps


def explain(network: Network, pixels: tf.Tensor) -> Explanation:
    """Probabilities float32 [B, C], heat maps float32 [B, h, w] in 0..1 and features, from one forward pass.

        explain(network, preprocess(images, preprocessing))  # images uint8 [B, S, S, 3]

    `pixels` is float32 [B, S, S, 3], preprocessed. For many batches, call it in a tf.function; it may also be part of a
    SavedModel. A map covers the square that the network receives. To overlay it on the original image, place the square
    as `preprocessing.resize` took it: stretched over the whole image (stretch), centered with the length of the longer
    side (pad) or of the shorter side (crop).

    The maximum of each map is 1. A region that supports other classes is 0; a map is all 0 if no region supports the
    predicted class. This is Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391) without the mean of the gradient over
    the regions (HiResCAM, Draelos and Carin, 2020, arXiv:2011.08891). Both give the same map with `--head=average`. With
    `--head=flatten`, where each region has its own weights, HiResCAM gives each region's exact contribution to the logit.
    Raises ValueError if the last layer of the backbone is not applied to the output of a convolution.
    """
    pooling = network.backbone.layers[-1]
    if len(pooling.input.shape) != 4:
        raise ValueError(
            f"The last layer of the backbone, {pooling.name!r}, has an input of shape {pooling.input.shape}: "
            "Grad-CAM needs [B, h, w, k]."
        )
    activations = keras.Model(network.backbone.input, pooling.input)(pixels, training=False)
    activations = tf.cast(activations, tf.float32)  # gradients would underflow in half precision
    with tf.GradientTape() as tape:
        tape.watch(activations)
        logits = network.head(pooling(activations), training=False)
        top_logit = tf.reduce_max(logits, axis=1)
    heat = tf.nn.relu(tf.reduce_sum(tape.gradient(top_logit, activations) * activations, axis=3))
    heat = tf.math.divide_no_nan(heat, tf.reduce_max(heat, axis=[1, 2], keepdims=True))
    return Explanation(tf.nn.softmax(logits), heat, tf.reduce_mean(activations, axis=[1, 2]))


def of_files(
    network: Network, directory: str, paths: list[str], *, network_input: NetworkInput
) -> dict[str, np.ndarray]:
    """Heat maps uint8 [h, w] of images in a data directory, by path. Images that cannot be read are left out."""

    @tf.function(input_signature=[tf.TensorSpec([None, *network.backbone.input_shape[1:]], tf.uint8)], autograph=False)
    def compute(images: tf.Tensor) -> tf.Tensor:
        return heatmaps(network, preprocess(images, network_input.preprocessing))

    images = {}
    for path in dict.fromkeys(paths):
        contents = shards.read(directory, path)
        try:
            images[path] = decode_image(tf.constant(contents or b""), network_input)
        except tf.errors.InvalidArgumentError:  # deleted or damaged since the start of the job
            continue
    readable_paths = list(images)
    maps: dict[str, np.ndarray] = {}
    for start in range(0, len(readable_paths), _BATCH_SIZE):
        batch = readable_paths[start : start + _BATCH_SIZE]
        heat = compute(tf.stack([images[path] for path in batch])).numpy()  # [B, h, w]
        maps |= dict(zip(batch, np.round(255 * heat).astype(np.uint8), strict=True))
    return maps
