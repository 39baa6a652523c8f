"""An image is the more novel the less its features resemble those of the training images."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.models import networks, novelty


def test_the_threshold_refuses_one_in_twenty_validation_images():
    random = np.random.default_rng(0)
    training, validation = (random.normal([5, 0, 0, 0, 0, 0], 1, (count, 6)).astype(np.float32) for count in (500, 300))
    known = novelty.fit(training, validation)
    assert known.refused_validation == 0.05
    scores = novelty.scores(tf.constant(validation), tf.constant(known.bank)).numpy()
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (training, validation)]
    expected = 1 - np.sort(units[1] @ units[0].T, axis=1)[:, -novelty.NEIGHBOR]
    np.testing.assert_allclose(scores, expected, atol=1e-3)
    strangers = random.normal([0, 0, 5, 0, 0, 0], 1, (300, 6)).astype(np.float32)
    assert np.mean(novelty.scores(tf.constant(strangers), tf.constant(known.bank)) > known.threshold) > 0.95


def test_one_training_and_one_validation_image_suffice():
    known = novelty.fit(np.float32([[1, 0]]), np.float32([[1, 1]]))
    assert known.refused_validation == 0
    assert known.threshold > 1 - 0.5**0.5


def test_the_bank_has_each_class_as_often_as_it_can():
    labels = np.repeat([0, 1, 2], [3000, 40, 1500])
    chosen = novelty.choose_bank(labels)
    assert len(chosen) == len(set(chosen)) == novelty.BANK_SIZE
    assert np.bincount(labels[chosen]).tolist() == [1004, 40, 1004]
    assert sorted(novelty.choose_bank(np.array([1, 1, 0]))) == [0, 1, 2]


@pytest.mark.parametrize("layer", [keras.layers.GlobalAveragePooling2D, keras.layers.Flatten])
def test_features_are_the_mean_over_the_cells_for_each_head(layer):
    inputs = keras.Input([4, 5, 3])
    network = networks.with_head(keras.Model(inputs, layer()(keras.layers.ReLU()(inputs))), 2)
    images = np.random.default_rng(0).uniform(size=(6, 4, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(novelty.pool(network, network.backbone(images)), images.mean(axis=(1, 2)), rtol=1e-5)
