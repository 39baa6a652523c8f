"""How unlike the training images an image is, for images of none of the classes.

The novelty of an image is 1 minus the cosine similarity of its features to the NEIGHBOR-th nearest of a bank of training
images: 0 of an image that was trained on several times, about 1 of one that has nothing in common with them. An image is
novel above the threshold that refuses 5 % of the validation images. Labels are not used.

Features are the means of the last feature map over its cells. Measured with ImageNet weights at 224 pixels, 80 % of six image
sets each against all images of the other five (docs/recipe.md describes the sets): of 3,006 other images a model of cats and
dogs refuses 98.7 %, of 5,406 one of ten objects 97.1 %, and three more sets all; but textures, with 32 unlike training images
of each class, only 45 % of 5,606. The class means instead of the third nearest let 10 % pass as cats or dogs; the tenth
nearest as few as the third, but with 200 training images 14 % instead of 7 %. Near strangers, two of ten kinds of objects
that are left out of the training, are refused in 88 % of the cases (78 to 93 %).

Shapes: B images, M in the bank, N training images, V validation images, F features (channels of the last feature map).
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.models.networks import Network

BANK_SIZE = 2048  # 16 MB for ResNet50
NEIGHBOR = 3
REFUSED_SHARE = 0.05  # of the validation images
_ROWS_AT_A_TIME = 1024


class Novelty(NamedTuple):
    """What an exported model needs to know of the training images."""

    bank: (
        np.ndarray
    )  # float32 [M, F], each of length 1; float16 needs AVX-512 in oneDNN, which logs an error without it
    threshold: float
    refused_validation: float  # share of the validation images above the threshold


def pool(network: Network, features: tf.Tensor) -> tf.Tensor:
    """The mean over the cells float32 [B, F] of outputs of the backbone, which a flattening one returns cell by cell."""
    channels = network.backbone.layers[-1].input.shape[-1]
    return tf.reduce_mean(tf.reshape(features, [-1, features.shape[-1] // channels, channels]), axis=1)


def choose_bank(labels: np.ndarray) -> np.ndarray:
    """Indices of at most BANK_SIZE of the N training images, as many of each class as it has images for."""
    order = np.random.default_rng(0).permutation(len(labels))
    rank = np.empty(len(labels), int)  # of an image within its class, at random
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank[by_class] = np.concatenate([np.arange(count) for count in counts])
    return np.sort(order[np.argsort(rank[order], kind="stable")][:BANK_SIZE])


def fit(training: np.ndarray, validation: np.ndarray) -> Novelty:
    """From features float32 [M, F] of the bank and [V, F] of validation images, both at least one.

    The threshold lies between two validation images, so that rounding does not refuse another one.
    """
    bank = _normalized(tf.constant(training)).numpy()
    chunks = [validation[start : start + _ROWS_AT_A_TIME] for start in range(0, len(validation), _ROWS_AT_A_TIME)]
    novelty = np.sort(np.concatenate([scores(tf.constant(chunk), tf.constant(bank)).numpy() for chunk in chunks]))
    num_refused = int(REFUSED_SHARE * len(novelty))
    last_accepted = novelty[len(novelty) - num_refused - 1]
    threshold = last_accepted + (novelty[-num_refused] - last_accepted if num_refused else 1e-3) / 2
    return Novelty(bank, float(threshold), float(np.mean(novelty > threshold)))


def scores(features: tf.Tensor, bank: tf.Tensor) -> tf.Tensor:
    """The novelty float32 [B] of features float32 [B, F]; `bank` is float32 [M, F]."""
    similarity = tf.matmul(_normalized(features), bank, transpose_b=True)  # [B, M]
    nearest = tf.math.top_k(similarity, min(NEIGHBOR, bank.shape[0])).values[:, -1]
    return tf.maximum(1 - nearest, 0)  # a similarity may be above 1, by rounding


def _normalized(features: tf.Tensor) -> tf.Tensor:
    return tf.math.l2_normalize(features, axis=1)
