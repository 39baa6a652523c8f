"""The architecture of the network, and the checks of weights files."""

import dataclasses

import keras
import numpy as np
import pytest

from trainer.errors import UserError
from trainer.models import backbones, networks
from trainer.models.backbones import BACKBONES


@pytest.fixture(scope="module")
def network():
    return networks.build(
        num_classes=3, image_size=32, backbone="ResNet50", weights="none", head="average", precision="float32", seed=0
    )


def dense_model(units: int) -> keras.Model:
    inputs = keras.Input([4])
    return keras.Model(inputs, keras.layers.Dense(units, name="answer")(inputs))


def test_parameters_and_outputs_are_those_of_the_table(network):
    assert (
        network.model.count_params()
        == BACKBONES["ResNet50"].parameters + (BACKBONES["ResNet50"].features_per_cell + 1) * 3
    )
    assert network.model.output_shape == (None, 3)
    probabilities = network.model(np.zeros((2, 32, 32, 3), np.float32)).numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_head_after_backbone_equals_the_model(network):
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    logits = network.head(network.backbone(images, training=False))
    np.testing.assert_allclose(keras.ops.softmax(logits), network.model(images, training=False), rtol=1e-5)


@pytest.mark.slow
def test_only_pretrained_weights_keep_their_batch_statistics(network, tmp_path):
    path = str(tmp_path / "w.weights.h5")
    network.model.save_weights(path)

    def are_trainable(weights: str, batch_norm: str) -> set[bool]:
        built = networks.build(
            num_classes=2,
            image_size=32,
            backbone="ResNet50",
            weights=weights,
            head="flatten",
            precision="mixed_bfloat16",
            seed=0,
            batch_norm=batch_norm,
        )
        outputs = [layer for layer in built.model.layers if layer.name in ("logits", "probabilities")]
        assert [layer.compute_dtype for layer in outputs] == ["float32", "float32"]
        assert networks.input_dtype(built.backbone) == "bfloat16"
        layers = [layer for layer in built.backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
        assert len(layers) == 53
        return {layer.trainable for layer in layers}

    assert are_trainable("none", "auto") == {True}
    assert are_trainable(path, "auto") == {False}
    assert are_trainable(path, "train") == {True}


@pytest.mark.slow
def test_weights_of_a_run_with_other_classes_fit_the_backbone(network, tmp_path):
    path = str(tmp_path / "best.weights.h5")
    network.model.save_weights(path)
    other = networks.build(
        num_classes=5, image_size=32, backbone="ResNet50", weights=path, head="average", precision="float32", seed=1
    )
    for expected, loaded in zip(network.backbone.weights, other.backbone.weights, strict=True):
        np.testing.assert_array_equal(expected.numpy(), loaded.numpy())


def test_an_error_names_the_layer_that_does_not_fit_with_its_shapes(tmp_path):
    path = str(tmp_path / "two.weights.h5")
    dense_model(2).save_weights(path)
    with pytest.raises(UserError, match="layer 'answer' has shapes 4x3, 3, the file has 4x2, 2"):
        networks.load_weights(dense_model(3), path, flag="--weights")


def test_weights_of_another_network_are_an_error(tmp_path, network):
    path = str(tmp_path / "dense.weights.h5")
    dense_model(2).save_weights(path)
    with pytest.raises(UserError, match=r"layer 'conv1_conv' .* the file has none"):
        networks.load_weights(network.backbone, path, flag="--weights")


def test_a_file_that_is_not_hdf5_or_does_not_exist_is_an_error(tmp_path):
    text, missing = tmp_path / "text.weights.h5", tmp_path / "missing.weights.h5"
    text.write_text("no weights")
    with pytest.raises(UserError, match="not a readable HDF5"):
        networks.load_weights(dense_model(2), str(text), flag="--weights")
    with pytest.raises(UserError, match=f"--weights={missing} does not exist: pass imagenet"):
        networks.load_weights(dense_model(2), str(missing), flag="--weights")
    with pytest.raises(UserError, match=f"^{missing} does not exist: restore it"):
        networks.load_weights(dense_model(2), str(missing))


def test_the_same_seed_gives_the_same_initial_weights():
    def kernel(seed: int) -> np.ndarray:
        keras.utils.set_random_seed(seed)
        return networks.with_head(dense_model(4), 3).head.weights[0].numpy()

    np.testing.assert_array_equal(kernel(1), kernel(1))
    assert np.abs(kernel(1) - kernel(2)).max() > 0


def build_with_failing_download(monkeypatch, message: str) -> None:
    def fail(**arguments):
        raise Exception(message)  # the type that Keras raises

    failing = dataclasses.replace(BACKBONES["ResNet50"], create=fail)
    monkeypatch.setitem(backbones.BACKBONES, "ResNet50", failing)
    networks.build(
        num_classes=2,
        image_size=32,
        backbone="ResNet50",
        weights="imagenet",
        head="average",
        precision="float32",
        seed=0,
    )


def test_a_failed_download_names_the_alternatives(monkeypatch):
    with pytest.raises(UserError) as error:
        build_with_failing_download(
            monkeypatch, "URL fetch failure on https://example.org/w.h5: None -- Name not known"
        )
    assert "Download https://example.org/w.h5 on a machine that can, copy it here and pass --weights=PATH" in str(
        error.value
    )
    assert str(error.value).endswith("--weights=none --head_epochs=0 --epochs=30")


def test_other_failures_of_keras_are_not_taken_for_a_download(monkeypatch):
    with pytest.raises(Exception, match=r"^something else$"):
        build_with_failing_download(monkeypatch, "something else")
