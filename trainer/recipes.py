"""--recipe: how long the whole network is trained, in one word, and the article's flags.

Decided from the number of images and the devices alone, so that all workers decide the same.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from trainer.config import Config
from trainer.formatting import duration

# Steps of fine-tuning: those of BiT-HyperRule for small sets (Kolesnikov et al., 2020, arXiv:1912.11370), within bounds
# for folders so small that they would be seen too often, or so large that they would hardly be seen.
FINETUNE_STEPS = 500
MIN_FINETUNE_EPOCHS, MAX_FINETUNE_EPOCHS = 3, 12
# `auto` fine-tunes on a GPU if that takes less than AUTO_SECONDS. The rate is an assumption, of images of 224 pixels on one
# GPU: a tenth of what one A100 is published to train, a quarter of what a V100 does.
AUTO_SECONDS = 3600
ASSUMED_IMAGES_PER_SECOND = 250
# A training step takes as long as the features of its images this many times: 4.3 measured at 224 pixels on two cores with
# AMX (5.5 against 23.5 images per second in float32), 3.4 at 96 pixels on two cores with AVX2.
STEP_OVER_FEATURES = 4
MIN_FINETUNE_IMAGES = 100  # below, nothing was measured, and validation is too small to show a gain

# The article's recipe; deploy/flags/article.flags explains it line by line.
ARTICLE: dict[str, Any] = {
    "image_size": 224,
    "preprocessing": "rescale",
    "validation_split": 0.2,
    "augment": "none",
    "weights": "imagenet",
    "head": "flatten",
    "batch_norm": "train",
    "batch_norm_momentum": 0.99,
    "dropout": 0.0,
    "summary": True,
    "optimizer": "adam",
    "learning_rate": 1e-4,
    "lr_schedule": "constant",
    "warmup_epochs": 0.0,
    "batch_size": 32,
    "head_epochs": 0,
    "epochs": 100,
    "monitor": "first_val_accuracy",
    "precision": "float32",
}


class Decision(NamedTuple):
    """The number of epochs of the whole network, and why, as a log line says it."""

    epochs: int
    reason: str


def with_recipe(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The values of all flags with those of --recipe in place of defaults; `given` names the flags that the user set."""
    if values["recipe"] != "article":
        return values
    return values | {name: value for name, value in ARTICLE.items() if name not in given}


def decide(settings: Config, *, num_training: int, num_gpus: int) -> Decision:
    """How many epochs --epochs=-1 stands for. `num_gpus` counts those of all workers."""
    if settings.epochs >= 0:
        return Decision(settings.epochs, "--epochs")
    if settings.recipe == "head":
        return Decision(0, "--recipe=head trains the head alone")
    epochs = finetune_epochs(num_training, settings.batch_size)
    if settings.recipe == "finetune":
        bounds = f"at least {MIN_FINETUNE_EPOCHS} and at most {MAX_FINETUNE_EPOCHS} epochs"
        return Decision(epochs, f"--recipe=finetune takes about {FINETUNE_STEPS} steps, {bounds}")
    if not settings.head_epochs:
        return Decision(epochs, "--head_epochs=0 leaves the whole network to train")
    if not num_gpus:
        return Decision(0, "no GPU: the head alone takes minutes; --recipe=finetune trains the whole network")
    if num_training < MIN_FINETUNE_IMAGES:
        return Decision(0, f"fewer than {MIN_FINETUNE_IMAGES} training images; --recipe=finetune trains them anyway")
    rate = ASSUMED_IMAGES_PER_SECOND * num_gpus * (224 / settings.image_size) ** 2
    seconds = epochs * num_training / rate
    if seconds > AUTO_SECONDS:
        return Decision(
            0, f"{epochs} epochs would take about {duration(seconds)}; --recipe=finetune trains them anyway"
        )
    return Decision(epochs, f"{epochs} epochs take about {duration(seconds)} or less on {num_gpus} GPU(s)")


def finetune_epochs(num_training: int, batch_size: int) -> int:
    """Epochs of about FINETUNE_STEPS steps, within bounds."""
    epochs = math.ceil(FINETUNE_STEPS * batch_size / max(num_training, 1))
    return min(max(epochs, MIN_FINETUNE_EPOCHS), MAX_FINETUNE_EPOCHS)


def finetune_seconds(feature_seconds_per_image: float, *, num_images: int) -> float:
    """Estimated seconds of fine-tuning on `num_images` images in all epochs together, from the time of the features."""
    return STEP_OVER_FEATURES * feature_seconds_per_image * num_images
