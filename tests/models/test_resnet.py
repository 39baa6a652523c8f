"""The network is the one it should be, and weights that do not fit are named."""

import keras
import numpy as np
import pytest

from trainer.errors import UserError
from trainer.models import resnet
from trainer.reporting import plan


@pytest.fixture(scope="module")
def network():
    return resnet.build(num_classes=3, image_size=32, weights="none", head="average", precision="float32", seed=0)


def test_the_network_is_resnet50_with_a_softmax_head_of_the_size_the_plan_tells(network):
    assert network.model.count_params() == plan.RESNET50_PARAMETERS + (plan.FEATURES_PER_CELL + 1) * 3
    assert network.model.output_shape == (None, 3)
    probabilities = network.model(np.zeros((2, 32, 32, 3), np.float32)).numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_head_behind_backbone_is_the_whole(network):
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    logits = network.head(network.backbone(images, training=False))
    np.testing.assert_allclose(keras.ops.softmax(logits), network.model(images, training=False), rtol=1e-5)


@pytest.mark.slow
def test_only_weights_that_were_given_keep_their_statistics(network, tmp_path):
    network.model.save_weights(tmp_path / "w.weights.h5")

    def trainable_norms(weights, batch_norm):
        built = resnet.build(
            num_classes=2,
            image_size=32,
            weights=weights,
            head="flatten",
            precision="mixed_bfloat16",
            seed=0,
            batch_norm=batch_norm,
        )
        assert {layer.compute_dtype for layer in built.model.layers if layer.name in ("logits", "probabilities")} == {
            "float32"
        }
        norms = [layer for layer in built.backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
        assert len(norms) == 53
        return {layer.trainable for layer in norms}

    path = str(tmp_path / "w.weights.h5")
    assert trainable_norms("none", "auto") == {True}
    assert trainable_norms(path, "auto") == {False}
    assert trainable_norms(path, "train") == {True}


@pytest.mark.slow
def test_weights_of_an_earlier_run_with_other_classes_give_the_backbone(network, tmp_path):
    path = str(tmp_path / "best.weights.h5")
    network.model.save_weights(path)
    other = resnet.build(num_classes=5, image_size=32, weights=path, head="average", precision="float32", seed=1)
    for mine, theirs in zip(network.backbone.weights, other.backbone.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


def tiny(units: int) -> keras.Model:
    inputs = keras.Input([4])
    return keras.Model(inputs, keras.layers.Dense(units, name="answer")(inputs))


def test_weights_that_do_not_fit_are_told_with_layer_and_shapes(tmp_path):
    path = str(tmp_path / "two.weights.h5")
    tiny(2).save_weights(path)
    with pytest.raises(UserError, match="layer 'answer' has shapes 4x3, 3, the file has 4x2, 2"):
        resnet.load_weights(tiny(3), path, flag="--weights")


def test_weights_of_another_network_or_none_at_all_are_told(tmp_path, network):
    path = str(tmp_path / "tiny.weights.h5")
    tiny(2).save_weights(path)
    with pytest.raises(UserError, match=r"layer 'conv1_conv' .* the file has none"):
        resnet.load_weights(network.backbone, path, flag="--weights")
    (tmp_path / "text.weights.h5").write_text("no weights")
    with pytest.raises(UserError, match="not a readable HDF5"):
        resnet.load_weights(tiny(2), str(tmp_path / "text.weights.h5"), flag="--weights")
    with pytest.raises(UserError, match="does not exist"):
        resnet.load_weights(tiny(2), str(tmp_path / "gone.weights.h5"), flag="--weights")


def test_the_same_seed_draws_the_same_weights():
    def kernel(seed):
        keras.utils.set_random_seed(seed)
        return resnet.with_head(tiny(4), 3).head.weights[0].numpy()

    np.testing.assert_array_equal(kernel(1), kernel(1))
    assert np.abs(kernel(1) - kernel(2)).max() > 0


def test_weights_that_cannot_be_downloaded_are_told_with_the_other_ways(monkeypatch):
    def fail(**arguments):
        raise Exception(failure)  # what Keras raises

    monkeypatch.setattr(keras.applications, "ResNet50", fail)
    failure = "URL fetch failure on https://example.org: None -- Name or service not known"
    with pytest.raises(UserError, match=r"URL fetch failure .*: pass the path of a weights file as --weights=PATH"):
        resnet._resnet50(32, "imagenet")
    failure = "something else"
    with pytest.raises(Exception, match=r"^something else$"):
        resnet._resnet50(32, "imagenet")
