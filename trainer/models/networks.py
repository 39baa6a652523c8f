"""The network, a backbone with a classification head, and its weights.

Shapes: B images, S pixels to a side, F features, C classes.
"""

import contextlib
import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import h5py
import keras

from trainer import cli
from trainer.errors import UserError
from trainer.models import backbones
from trainer.storage import files

MAX_COMPRESSION = 20  # of an array in a weights file


class Network(NamedTuple):
    """Three models that share their layers.

    `model`: preprocessed images float [B, S, S, 3] -> probabilities float32 [B, C]; best.weights.h5 holds its weights.
    `backbone`: preprocessed images -> features float32 [B, F]. `head`: features -> logits float32 [B, C].
    """

    model: keras.Model
    backbone: keras.Model
    head: keras.Model


def build(
    *,
    num_classes: int,
    image_size: int,
    backbone: str,
    weights: str,
    head: str,
    precision: str,
    seed: int,
    batch_norm: str = "auto",
    batch_norm_momentum: float = 0.9,
) -> Network:
    """Builds a backbone (see backbones.BACKBONES) and a head drawn from `seed`.

    `weights` is imagenet, none, or the path of a Keras weights file. `precision` is a Keras dtype policy; pooling, logits
    and softmax are always float32. `batch_norm` is `frozen` (keeps the statistics of the weights), `train`, or `auto`:
    frozen for pretrained weights, trained for random ones; `batch_norm_momentum` is that of trained statistics. Raises
    UserError if the weights are not available or do not fit.
    """
    with seeded(seed, precision):
        base = _with_weights(backbone, image_size, weights)
        for layer in base.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                # Per layer: the `training` argument of the outer model overrides that of a nested call (keras#20285).
                layer.trainable = updates_batch_statistics(batch_norm, weights)
                layer.synchronized = True  # statistics of the global batch on any number of replicas
                layer.momentum = batch_norm_momentum
        pooling = keras.layers.GlobalAveragePooling2D if head == "average" else keras.layers.Flatten
        features = pooling(dtype="float32", name="features")(base.output)
        return with_head(keras.Model(base.input, features, name="backbone"), num_classes)


@contextlib.contextmanager
def seeded(seed: int, precision: str) -> Iterator[None]:
    """Layers that are built in the block draw their weights from `seed` and compute in the Keras dtype policy `precision`.

    Keras draws the seed of a layer from Python's random numbers, which continue afterwards as if nothing had been drawn:
    the program around the job has its own.
    """
    state, policy = random.getstate(), keras.config.dtype_policy()
    random.seed(seed)
    keras.config.set_dtype_policy(precision)  # keras.applications has no argument for it
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
        random.setstate(state)


def with_head(backbone: keras.Model, num_classes: int) -> Network:
    """Adds a dense softmax head to a backbone with float32 features."""
    dense = keras.layers.Dense(num_classes, dtype="float32", name="logits")
    features = keras.Input([backbone.output.shape[-1]], name="features_input")
    head = keras.Model(features, dense(features), name="head")
    softmax = keras.layers.Activation("softmax", dtype="float32", name="probabilities")
    model = keras.Model(backbone.input, softmax(dense(backbone.output)), name="classifier")
    return Network(model, backbone, head)


def input_dtype(backbone: keras.Model) -> str:
    """The dtype to which the first layer casts its input, so that images may have it before they are copied to a device.

    The dtype of the model itself is float32 in every precision: it is built from layers that have their own.
    """
    return next(layer for layer in backbone.layers if not isinstance(layer, keras.layers.InputLayer)).compute_dtype


def rebuild(
    weights_path: str,
    *,
    num_classes: int,
    image_size: int,
    backbone: str,
    head: str,
    temperature: float = 1.0,
    build_network: Callable[..., Network] = build,
) -> Network:
    """Rebuilds the float32 network of a run from its best weights, for export, prediction and evaluation.

    Its logits are divided by `temperature` (see training.calibration): the head has the weights of the file, divided.
    `build_network` is `build` or a function with the same arguments. Raises UserError if the weights do not fit.
    """
    network = build_network(
        num_classes=num_classes,
        image_size=image_size,
        backbone=backbone,
        weights="none",
        head=head,
        precision="float32",
        seed=0,
    )
    load_weights(network.model, weights_path)
    for variable in network.head.variables:
        variable.assign(variable / temperature)
    return network


def updates_batch_statistics(batch_norm: str, weights: str) -> bool:
    """Whether fine-tuning updates the batch-norm statistics; `weights` decides for `auto`."""
    return batch_norm == "train" or (batch_norm == "auto" and weights == "none")


def weights_fingerprint(weights: str) -> str:
    """Identifies weights: imagenet, none, or the MD5 of a file."""
    if weights in ("imagenet", "none"):
        return weights
    return hashlib.md5(files.read_existing(weights), usedforsecurity=False).hexdigest()


def load_weights(model: keras.Model, path: str, *, flag: str = "") -> None:
    """Loads a Keras weights file (.weights.h5 or the older .h5) into `model`. Other layers in the file are ignored.

    Raises UserError that names the file, with the flag that it came from, and the first layer that does not fit with
    both shapes.
    """
    name = f"{flag}={path}" if flag else path
    if not files.exists(path):
        fix = "pass imagenet, none or the path of a weights file" if flag else "restore it, or train again"
        raise UserError(f"{name} does not exist: {fix}.")
    with files.local_copy(path) as local_path:
        _load_local_weights(model, local_path, name)


def _with_weights(backbone: str, image_size: int, weights: str) -> keras.Model:
    if weights == "none":
        return backbones.create(backbone, image_size=image_size, weights=None)
    if weights == "imagenet":
        try:
            return backbones.create(backbone, image_size=image_size, weights="imagenet")
        except Exception as error:
            if "URL fetch failure" not in str(error):  # Keras raises a plain Exception, which only its text identifies
                raise
            url = re.search(r"https?://\S+?(?=:? )", str(error))
            random = cli.this_command("--weights=none", "--head_epochs=0", "--epochs=30")
            raise UserError(
                f"--weights=imagenet could not be downloaded ({' '.join(str(error).split())}). Download "
                f"{url[0] if url else 'the file'} on a machine that can, copy it here and pass --weights=PATH; or train from "
                f"random weights, which needs thousands of images: {random}"
            ) from None
    model = backbones.create(backbone, image_size=image_size, weights=None)
    load_weights(model, weights, flag="--weights")
    return model


def _load_local_weights(model: keras.Model, local_path: str, name: str) -> None:
    try:
        with h5py.File(local_path, "r") as weights_file:
            mismatch = _too_large(weights_file, os.path.getsize(local_path)) or _first_mismatch(model, weights_file)
    # KeyError: a link in the file that cannot be resolved; RuntimeError: damaged structures.
    except (OSError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"{name} is not a readable HDF5 weights file: {error}") from None
    if mismatch:
        raise UserError(f"{name} does not fit the network: {mismatch}")
    try:
        model.load_weights(local_path)
    except (ValueError, KeyError, OSError, RuntimeError) as error:  # OSError: damaged contents
        raise UserError(f"{name} does not fit the network: {str(error).splitlines()[0]}") from None


def _too_large(weights_file: h5py.File, file_bytes: int) -> str:
    """Describes an array whose size is not plausible in a file of that many bytes, '' if there is none.

    HDF5 fills what a file lacks: one of a kilobyte can claim more than the memory holds. Weights hardly compress.
    """
    found: list[str] = []

    def check(path: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.nbytes > MAX_COMPRESSION * file_bytes:
            found.append(f"{path} claims {item.nbytes / 2**30:.1f} GiB, the file has {file_bytes} bytes.")

    weights_file.visititems(check)
    return found[0] if found else ""


def _first_mismatch(model: keras.Model, weights_file: h5py.File) -> str:
    """Describes the first layer whose shapes differ, '' if there is none.

    Only files of Keras 3 have the name of each layer with its variables. Keras checks the older ones when it loads them,
    and layers to which it gave a name with a number, which differs from process to process.
    """
    shapes_in_file: dict[str, list[tuple[int, ...]]] = {}

    def collect(path: str, item: Any) -> None:
        if path.endswith("vars") and isinstance(item, h5py.Group) and "name" in item.attrs:
            shapes_in_file[item.attrs["name"]] = [item[str(i)].shape for i in range(len(item))]

    weights_file.visititems(collect)
    if not shapes_in_file:
        return ""
    for layer in _layers(model):
        expected = [tuple(variable.shape) for variable in layer.variables]
        if layer.name not in shapes_in_file and _has_automatic_name(layer):
            continue
        actual = shapes_in_file.get(layer.name, [])
        if expected and actual != expected:
            in_file = _format_shapes(actual) if actual else "none"
            return f"layer {layer.name!r} has shapes {_format_shapes(expected)}, the file has {in_file}."
    return ""


def _layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers, with those of inner models in their place."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer)
        else:
            yield layer


def _has_automatic_name(layer: keras.layers.Layer) -> bool:
    """Whether the name is that of the class, as in layer_normalization_2."""
    return re.sub(r"_\d+$", "", layer.name).replace("_", "") == type(layer).__name__.lower()


def _format_shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)
