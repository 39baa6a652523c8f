"""The backbones that --backbone names: how Keras creates them, their sizes, and the input that ImageNet weights expect.

Shapes: S pixels to a side, F features.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras

from trainer import earlier_runs
from trainer.data.preprocessing import NetworkInput


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network of keras.applications without its top, and facts about it. Each takes 32 pixels or more.

    `create` takes the arguments of keras.applications.ResNet50 and leaves preprocessing to the caller.
    """

    create: Callable[..., keras.Model]
    parameters: int  # including batch statistics
    features_per_cell: int  # F of an average head
    imagenet_preprocessing: str  # what its ImageNet weights were trained on, as preprocessing.preprocess names it
    rounds_up: bool = True  # whether a last cell of fewer than 32 pixels counts

    def num_cells(self, image_size: int) -> int:
        """Number of cells of the last feature map, each of 32 x 32 pixels of the input."""
        return (-(-image_size // 32) if self.rounds_up else image_size // 32) ** 2


BACKBONES = {
    "ResNet50": Backbone(keras.applications.ResNet50, 23_587_712, 2048, "caffe"),
    "ResNet101": Backbone(keras.applications.ResNet101, 42_658_176, 2048, "caffe"),
    "EfficientNetV2B0": Backbone(
        functools.partial(keras.applications.EfficientNetV2B0, include_preprocessing=False), 5_919_312, 1280, "torch"
    ),
    "ConvNeXtTiny": Backbone(
        functools.partial(keras.applications.ConvNeXtTiny, include_preprocessing=False),
        27_820_128,
        768,
        "torch",
        rounds_up=False,
    ),
    "MobileNetV3Large": Backbone(
        functools.partial(keras.applications.MobileNetV3Large, include_preprocessing=False), 2_996_352, 960, "tf"
    ),
}


def create(name: str, *, image_size: int, weights: str | None) -> keras.Model:
    """The backbone of that name, without random layers: [B, S, S, 3] -> [B, h, w, F] in the current dtype policy.

    `weights` is imagenet or None. What Keras raises if it cannot download the weights is passed on.

    EfficientNetV2 skips blocks at random in training (stochastic depth, by Dropout layers). Their random state is a
    variable of the model: a checkpoint of the weights would restart it, each replica would have its own, and an export
    would hold it as a weight. Training is a function of seed and step, so these layers drop nothing here; the dropout
    before the head (--dropout) is drawn from seed and step.
    """
    model = BACKBONES[name].create(weights=weights, include_top=False, input_shape=(image_size, image_size, 3))
    if not any(isinstance(layer, keras.layers.Dropout) for layer in model.layers):
        return model
    without_dropout = keras.models.clone_model(model, clone_function=_without_dropout)
    without_dropout.set_weights(model.get_weights())
    return without_dropout


def _without_dropout(layer: keras.layers.Layer) -> keras.layers.Layer:
    settings = layer.get_config()
    if isinstance(layer, keras.layers.Dropout):
        settings["rate"] = 0.0  # the layer then has no random state
    return layer.__class__.from_config(settings)


def input_from_flags(flags: Mapping[str, Any]) -> NetworkInput:
    """The input of the network of a run, from its flags as config.json holds them."""
    preprocessing = flags["preprocessing"]
    if preprocessing == "imagenet":
        preprocessing = BACKBONES[earlier_runs.recorded(flags, "backbone")].imagenet_preprocessing
    return NetworkInput(flags["image_size"], earlier_runs.recorded(flags, "resize"), preprocessing)
