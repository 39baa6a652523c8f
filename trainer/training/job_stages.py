"""The stages that the flags ask for, each prepared when the one before has ended."""

from collections.abc import Callable, Iterator

import numpy as np
from absl import logging

from trainer import formatting, recipes
from trainer.config import Config
from trainer.errors import UserError
from trainer.models import networks
from trainer.runtime import agreement
from trainer.training import look_alikes, stages
from trainer.training.inference import ModelOutputs
from trainer.training.loop import ProfileRange
from trainer.training.optimizer import Recipe
from trainer.training.stages import StageInputs
from trainer.training.trainer import HEAD, WHOLE_NETWORK, Stage, Trainer

MAX_GROUP_SHARE = 0.5  # of the images: what is left to hold out beside a larger group is no sample of them


def remaining_stages(
    settings: Config,
    inputs: StageInputs,
    trainer: Trainer,
    *,
    feature_dir: str,
    profile_range: tuple[int, int] | None,
    on_flips: Callable[[bool], None],
) -> Iterator[Stage]:
    """Yields the stages that are not complete.

    The features of the head are kept in `feature_dir`. `on_flips` receives whether augmentation flips images, before the
    whole network is trained. Raises UserError if too many images cannot be decoded, and TrainingInterrupted.
    """

    def profile(stage: str) -> ProfileRange | None:
        """Profiled are steps of the whole network, or of the head where that is the only stage."""
        if not profile_range or (stage == HEAD and settings.epochs):
            return None
        return ProfileRange(settings.tensorboard_dir if inputs.is_chief else "", *profile_range)

    if settings.head_epochs and trainer.state.stage != WHOLE_NETWORK:
        stage = stages.head_stage(
            inputs,
            epochs=settings.head_epochs,
            recipe=recipe_of(settings, HEAD),
            feature_dir=feature_dir,
            feature_source=feature_source(settings, inputs),
            profile=profile(HEAD),
        )
        if not settings.epochs:
            _log_cost_of_finetuning(settings, stage, len(inputs.split.training))
        yield stage
    if settings.epochs:
        if trainer.state.stage != WHOLE_NETWORK:
            trainer.state.flips = _choose_flips(settings, inputs, trainer)
        on_flips(trainer.state.flips)
        yield stages.whole_network_stage(
            inputs,
            epochs=settings.epochs,
            recipe=recipe_of(settings, WHOLE_NETWORK),
            augment=settings.augment,
            flips=trainer.state.flips,
            profile=profile(WHOLE_NETWORK),
        )


def recipe_of(settings: Config, stage: str) -> Recipe:
    """How a stage is trained: the flags, with `auto` and -1 resolved."""
    chosen = "lamb" if stage == WHOLE_NETWORK and settings.weights != "none" else "adam"
    return Recipe(
        optimizer=chosen if settings.optimizer == "auto" else settings.optimizer,
        learning_rate=settings.head_learning_rate if stage == HEAD else settings.learning_rate,
        lr_schedule=settings.lr_schedule,
        warmup_epochs=0.0 if stage == HEAD and settings.warmup_epochs == -1 else settings.warmup_epochs,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        label_smoothing=settings.label_smoothing,
        dropout=settings.dropout,
    )


def feature_source(settings: Config, inputs: StageInputs) -> tuple:
    """What cached features depend on besides the images and the precision."""
    weights = networks.weights_fingerprint(settings.weights)
    return (settings.backbone, weights, inputs.network_input, settings.head)


def read_features(settings: Config, inputs: StageInputs, *, feature_dir: str) -> ModelOutputs | None:
    """Features of all images by the frozen backbone, in the order of images.paths; None without a head stage."""
    if not settings.head_epochs:
        return None
    return stages.read_features(inputs, feature_dir=feature_dir, feature_source=feature_source(settings, inputs))


def similar_groups(settings: Config, inputs: StageInputs, *, feature_dir: str) -> np.ndarray:
    """The group of each image by look_alikes.groups, int64 [N + V] in the order of images.paths, the same on all workers.

    Raises UserError if there are too many images, or if more than MAX_GROUP_SHARE of them are one group, and as
    stages.cached_features.
    """
    if len(inputs.images.paths) > look_alikes.MAX_GROUPED_IMAGES:
        raise UserError(
            f"--group_by=similar compares all images with each other: {len(inputs.images.paths)} are too many, at most "
            f"{look_alikes.MAX_GROUPED_IMAGES} are possible. Pass a regular expression that finds the scene in the path."
        )
    features = stages.cached_features(
        inputs, feature_dir=feature_dir, feature_source=feature_source(settings, inputs), batch_times=[]
    )
    found = look_alikes.groups(features).astype(np.float32) if inputs.is_chief else None  # exact below 16 million
    groups = agreement.from_chief(found, (len(features.values),), inputs.devices).astype(np.int64)
    sizes = np.bincount(groups)
    logging.info(
        "Of %d images, %d look like another one; the largest of %d groups has %d.",
        len(groups),
        sizes[sizes > 1].sum(),
        np.count_nonzero(sizes > 1),
        sizes.max(),
    )
    if sizes.max() > MAX_GROUP_SHARE * len(groups):
        raise UserError(
            f"--group_by=similar: {sizes.max()} of {len(groups)} images look alike to the backbone and form one group, as "
            "happens where all have the same background: pass a regular expression that finds the scene in the path, or "
            "--group_by=none."
        )
    return groups


def _log_cost_of_finetuning(settings: Config, stage: Stage, num_training: int) -> None:
    """Says what a run that trains the head alone leaves out, if the time of the features tells how long it would take."""
    if stage.feature_seconds_per_image is None:
        return
    epochs = recipes.finetune_epochs(num_training, settings.batch_size)
    seconds = recipes.finetune_seconds(stage.feature_seconds_per_image, num_images=epochs * num_training)
    logging.info(
        "Fine-tuning the whole network after the head (--recipe=finetune: %d epochs) would take about %s on this machine. "
        "docs/recipe.md says what it brought on several kinds of images.",
        epochs,
        formatting.duration(seconds),
    )


def _choose_flips(settings: Config, inputs: StageInputs, trainer: Trainer) -> bool:
    """Resolves --flip. Without a head stage there is nothing to decide it from."""
    if settings.flip != "auto" or settings.augment == "none" or not trainer.best.epoch:
        return settings.flip != "off"
    return stages.flips_keep_labels(inputs, trainer.best.probabilities)
