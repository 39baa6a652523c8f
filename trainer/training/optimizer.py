"""The Keras optimizer of a stage and its learning-rate schedule."""

import dataclasses
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stage is trained; `learning_rate` is the peak of the schedule.

    `warmup_epochs` -1 is a tenth of the stage.
    """

    optimizer: str
    learning_rate: float
    lr_schedule: str = "constant"
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    dropout: float = 0.0


class _LocalGradients:
    """Makes a Keras optimizer apply the gradients that it gets, without summing them over the replicas.

    TrainingLoop sums them before, so that clipping and the overflow test see the gradient of the global batch. Keras
    would apply both to the gradient of each replica and sum afterwards (keras 3.15).
    """

    def _all_reduce_sum_gradients(self, grads_and_vars: list) -> list:
        return grads_and_vars


class _Adam(_LocalGradients, keras.optimizers.Adam):
    """Adam on gradients that are summed already."""


class _AdamW(_LocalGradients, keras.optimizers.AdamW):
    """AdamW on gradients that are summed already."""


class _Lamb(_LocalGradients, keras.optimizers.Lamb):
    """LAMB on gradients that are summed already.

    The learning rate is relative: each step changes the weights of a layer by that fraction of their norm (You et al.,
    2020, arXiv:1904.00962). One rate therefore suits all layers, although the gradient of ResNet50's first convolution,
    whose inputs are a hundred times larger than any other's, is a thousand times that of the others, and it suits
    weights of any scale.
    """


class _SGD(_LocalGradients, keras.optimizers.SGD):
    """SGD on gradients that are summed already."""


def make_optimizer(recipe: Recipe, *, epochs: int, steps_per_epoch: int, loss_scaling: bool) -> keras.Optimizer:
    """The Keras optimizer of a recipe, for TrainingLoop. `loss_scaling` is for float16, in which small gradients underflow."""
    kinds = {"adam": _Adam, "adamw": _AdamW, "lamb": _Lamb, "sgd": _SGD}
    arguments: dict[str, float | None] = {"momentum": 0.9} if recipe.optimizer == "sgd" else {}
    if recipe.weight_decay or recipe.optimizer != "adamw":  # AdamW has a default weight decay of its own
        arguments["weight_decay"] = recipe.weight_decay or None
    optimizer = kinds[recipe.optimizer](
        learning_rate_schedule(recipe, epochs=epochs, steps_per_epoch=steps_per_epoch),
        global_clipnorm=recipe.clip_norm or None,
        name=recipe.optimizer,  # the default is the name of the class, and a scope must not start with an underscore
        **arguments,
    )
    return keras.optimizers.LossScaleOptimizer(optimizer) if loss_scaling else optimizer


def learning_rate_schedule(recipe: Recipe, *, epochs: int, steps_per_epoch: int) -> Any:
    """A float, or a Keras schedule over optimizer steps: linear warm-up, then constant or cosine."""
    warmup_epochs = epochs / 10 if recipe.warmup_epochs == -1 else recipe.warmup_epochs
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if recipe.lr_schedule == "constant" and not warmup_steps:
        return recipe.learning_rate
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else recipe.learning_rate,
        max(1, epochs * steps_per_epoch - warmup_steps),
        alpha=1.0 if recipe.lr_schedule == "constant" else 0.0,  # a cosine that ends at its first value is constant
        warmup_target=recipe.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
