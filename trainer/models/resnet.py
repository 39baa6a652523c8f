"""ResNet50 with a head, its weights, and what of it is trained.

Shapes: B pictures, S pixels to a side, F features, C classes.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import h5py
import keras

from trainer.errors import UserError
from trainer.storage import files

# Keras' default of 0.99 needs hundreds of steps until the moving statistics follow; a small folder trained from random
# weights has few. 0.9 is what torchvision and the network's authors used (momentum 0.1 in their way of counting).
FROM_SCRATCH_MOMENTUM = 0.9


class Network(NamedTuple):
    """The same layers three times over: whole, without and behind the features.

    `model`: preprocessed pictures float [B, S, S, 3] -> probabilities float32 [B, C]; its weights are the saved ones.
    `backbone`: pictures -> features float32 [B, F]. `head`: features -> logits float32 [B, C].
    """

    model: keras.Model
    backbone: keras.Model
    head: keras.Model


def build(
    *, num_classes: int, image_size: int, weights: str, head: str, precision: str, seed: int, batch_norm: str = "auto"
) -> Network:
    """The network, on `weights` (imagenet, none, or the path of a Keras weights file), head freshly drawn from `seed`.

    `precision` is a Keras dtype policy; pooling, logits and softmax are float32 in any. `batch_norm` is `frozen` (the
    statistics of the weights are kept), `train`, or `auto`: frozen on given weights, trained from random ones.
    Raises UserError if the weights cannot be had or do not fit.
    """
    keras.utils.set_random_seed(seed)
    policy_before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)  # keras.applications takes the policy from nowhere else
    try:
        resnet = _resnet50(image_size, weights)
    finally:
        keras.config.set_dtype_policy(policy_before)
    for layer in resnet.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            # Freezing is per layer: `training=False` on the call loses against the outer model's (keras#20285).
            layer.trainable = updates_batch_statistics(batch_norm, weights)
            layer.synchronized = True  # replicas share the statistics of the global batch, as one device would have
            if weights == "none":
                layer.momentum = FROM_SCRATCH_MOMENTUM
    pooling = keras.layers.GlobalAveragePooling2D if head == "average" else keras.layers.Flatten
    features = pooling(dtype="float32", name="features")(resnet.output)
    return with_head(keras.Model(resnet.input, features, name="backbone"), num_classes)


def with_head(backbone: keras.Model, num_classes: int) -> Network:
    """Any backbone of float32 features with a dense softmax head on it."""
    dense = keras.layers.Dense(num_classes, dtype="float32", name="logits")
    features = keras.Input([backbone.output.shape[-1]], name="features_input")
    head = keras.Model(features, dense(features), name="head")
    softmax = keras.layers.Activation("softmax", dtype="float32", name="probabilities")
    model = keras.Model(backbone.input, softmax(dense(backbone.output)), name="classifier")
    return Network(model, backbone, head)


def rebuild(
    weights_path: str, *, num_classes: int, image_size: int, head: str, build_network: Callable[..., Network] = build
) -> Network:
    """The float32 network of a run with the weights of its best.weights.h5; for export, prediction and evaluation.

    `build_network` is `build` or a function with the same arguments. Raises UserError if the weights do not fit.
    """
    network = build_network(
        num_classes=num_classes, image_size=image_size, weights="none", head=head, precision="float32", seed=0
    )
    load_weights(network.model, weights_path, flag="best.weights.h5")
    return network


def updates_batch_statistics(batch_norm: str, weights: str) -> bool:
    """Whether fine-tuning moves the statistics of batch normalisation, which `auto` leaves to where the weights come from."""
    return batch_norm == "train" or (batch_norm == "auto" and weights == "none")


def _resnet50(image_size: int, weights: str) -> keras.Model:
    def make(weights: str | None) -> keras.Model:
        return keras.applications.ResNet50(weights=weights, include_top=False, input_shape=(image_size, image_size, 3))

    if weights == "none":
        return make(None)
    if weights == "imagenet":
        try:
            return make("imagenet")
        except Exception as error:
            if "URL fetch failure" not in str(error):  # Keras raises a plain Exception, its text is all there is
                raise
            raise UserError(
                f"--weights=imagenet could not be downloaded ({' '.join(str(error).split())}): pass the path of a "
                "weights file as --weights=PATH, or --weights=none to start from random ones."
            ) from None
    model = make(None)
    load_weights(model, weights, flag="--weights")
    return model


def weights_fingerprint(weights: str) -> str:
    """What tells weights apart: their name, and of a file its content."""
    if weights in ("imagenet", "none"):
        return weights
    return hashlib.md5(files.read_existing(weights), usedforsecurity=False).hexdigest()


def load_weights(model: keras.Model, path: str, *, flag: str) -> None:
    """Loads a Keras weights file (.weights.h5 or the older .h5) into the layers of `model`; further layers in it are left.

    Raises UserError that names the file, and the first layer that does not fit with both shapes.
    """
    if not files.exists(path):
        raise UserError(f"{flag}={path} does not exist: pass imagenet, none or the path of a weights file.")
    with files.local_copy(path) as local_path:
        _load_local_weights(model, local_path, f"{flag}={path}")


def _load_local_weights(model: keras.Model, local_path: str, name: str) -> None:
    try:
        with h5py.File(local_path, "r") as weights_file:
            mismatch = _first_mismatch(model, weights_file)
    except (OSError, KeyError) as error:  # KeyError: a link inside the file that leads nowhere
        raise UserError(f"{name} is not a readable HDF5 weights file: {error}") from None
    if mismatch:
        raise UserError(f"{name} does not fit the network: {mismatch}")
    try:
        model.load_weights(local_path)
    except (ValueError, KeyError) as error:
        raise UserError(f"{name} does not fit the network: {str(error).splitlines()[0]}") from None


def _first_mismatch(model: keras.Model, weights_file: h5py.File) -> str:
    """'' or the first layer whose shapes differ; files of Keras 3 tell each layer's name at its variables."""
    shapes = {}

    def collect(path: str, item: Any) -> None:
        if path.endswith("vars") and isinstance(item, h5py.Group) and "name" in item.attrs:
            shapes[item.attrs["name"]] = [item[str(i)].shape for i in range(len(item))]

    weights_file.visititems(collect)
    if not shapes:
        return ""  # the older layout: Keras' own check must do
    for layer in model.layers:
        expected = [tuple(variable.shape) for variable in layer.variables]
        found = shapes.get(layer.name, [])
        if expected and found != expected:
            return f"layer {layer.name!r} has shapes {_format_shapes(expected)}, the file has {_format_shapes(found) if found else 'none'}."
    return ""


def _format_shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)
