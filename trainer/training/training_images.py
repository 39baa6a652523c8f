"""What the training images look like to the network that is exported, to recognize images that are unlike them.

Shapes: N training and V validation examples, S pixels to a side, F features (channels of the last feature map).
"""

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import shards
from trainer.data.preprocessing import decode_image, preprocess
from trainer.models import folded, novelty
from trainer.models.networks import Network
from trainer.models.novelty import Novelty
from trainer.storage import files
from trainer.training.inference import ModelOutputs
from trainer.training.stages import StageInputs

_MAX_VALIDATION_IMAGES = 1000  # whose features are computed for the threshold
_BATCH_SIZE = 32


def fit_novelty(
    network: Network, inputs: StageInputs, features: ModelOutputs | None, *, data_dir: str
) -> Novelty | None:
    """The novelty score of `network`, which may be another one than that of `inputs`; None without a readable image.

    `features` are those of all images by this network's backbone, in the order of inputs.images.paths. Without them, as
    after fine-tuning, this process computes those of a sample on one device.
    """
    training, validation = inputs.images.split_indices
    bank = training[novelty.choose_bank(inputs.split.training.labels)]
    if features:
        rows = [index[features.is_readable[index]] for index in (bank, validation)]
        values = [novelty.pool(network, tf.constant(features.values[index])).numpy() for index in rows]
    else:
        shown = validation[
            np.linspace(0, len(validation) - 1, min(len(validation), _MAX_VALIDATION_IMAGES)).astype(int)
        ]
        logging.info("Novelty: features of %d images by the best network.", len(bank) + len(shown))
        network = folded.fold_network(network)
        values = [_features_of_files(network, inputs, index, data_dir) for index in (bank, shown)]
    if not all(map(len, values)):
        return None
    return novelty.fit(*values)


def _features_of_files(network: Network, inputs: StageInputs, index: np.ndarray, data_dir: str) -> np.ndarray:
    """Features float32 [n, F] of those images of inputs.images.paths[index] that can be read."""

    @tf.function(input_signature=[tf.TensorSpec([None, *network.backbone.input_shape[1:]], tf.uint8)], autograph=False)
    def compute(images: tf.Tensor) -> tf.Tensor:
        pixels = preprocess(images, inputs.network_input.preprocessing)
        return novelty.pool(network, network.backbone(pixels, training=False))

    def decode(path: str) -> tf.Tensor | None:
        try:
            return decode_image(tf.constant(shards.read(data_dir, path) or b""), inputs.network_input)
        except tf.errors.InvalidArgumentError:  # damaged, or deleted since the start of the job
            return None

    values = []
    with inputs.progress.bar("computing features", len(index)) as bar:
        for start in range(0, len(index), _BATCH_SIZE):
            chosen = index[start : start + _BATCH_SIZE]
            images = [image for image in files.parallel(decode, inputs.images.paths[chosen]) if image is not None]
            if images:
                values.append(compute(tf.stack(images)).numpy())
            bar.update(len(chosen))
    return np.concatenate(values) if values else np.zeros((0, 1), np.float32)
