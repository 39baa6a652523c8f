"""The plan of a run, which --dry_run prints: images, steps, network, devices and paths."""

import shlex
from typing import Any

from trainer import config
from trainer.config import Config
from trainer.data import sampler
from trainer.data.dataset import Folder, Split
from trainer.models.backbones import BACKBONES

_MAX_CLASSES = 30  # lines of the plan


def describe(settings: Config, folder: Folder, split: Split, resolved: dict[str, Any]) -> str:
    """The plan as text. `resolved` holds the values that the flags set to `auto` resolved to, as in config.json."""
    training, validation, num_classes = len(split.training), len(split.validation), len(folder.class_names)
    steps = sampler.steps_per_epoch(training, settings.batch_size)
    backbone = BACKBONES[settings.backbone]
    features = backbone.features_per_cell * (
        1 if settings.head == "average" else backbone.num_cells(settings.image_size)
    )
    parameters = backbone.parameters + (features + 1) * num_classes
    changed = {name: value for name, value in settings.as_dict().items() if value != config.DEFAULTS[name]}
    test = f"{len(split.test)} to test, " if len(split.test) else ""
    lines = [
        "Plan (nothing is written):",
        f"  images      {training} to train on, {validation} to validate, {test}{len(folder.bad_files)} bad files left out",
        f"  split       {resolved['split']}",
        *[f"  note        {note}" for note in folder.notes],
        *_class_lines(folder, split),
        f"  recipe      {settings.recipe}: {resolved['epochs_reason']}",
        f"  stage head  {_head_stage(settings.head_epochs, steps)} over {features} features per image, computed once",
        f"  stage all   {settings.epochs} epochs of {steps} steps over images of {settings.image_size} pixels",
        f"  batch       {settings.batch_size} images over {resolved['replicas']} replicas "
        f"of {resolved['workers']} workers",
        f"  network     {settings.backbone}, {settings.head} head, softmax over {num_classes} classes: "
        f"{parameters:,} parameters; weights: {settings.weights}",
        f"  input       {settings.image_size} x {settings.image_size} pixels; resize: {settings.resize}; "
        f"preprocessing: {settings.preprocessing}",
        f"  devices     {', '.join(resolved['devices'])}; XLA {'on' if resolved['xla'] else 'off'}",
        f"  precision   {resolved['precision']}: {resolved['precision_reason']}",
        f"  data_dir    {settings.data_dir}",
        f"  job_dir     {settings.job_dir}",
        f"  SavedModel  {settings.model_dir}",
        f"  TensorBoard {settings.tensorboard_dir}",
        "  flags       " + shlex.join(f"--{name}={value}" for name, value in changed.items()),
    ]
    return "\n".join(lines)


def _head_stage(head_epochs: int, steps: int) -> str:
    if head_epochs == -1:
        return "logistic regression (on a very large folder 15 epochs)"
    return f"{head_epochs} epochs of {steps} steps"


def _class_lines(folder: Folder, split: Split) -> list[str]:
    lines = [
        f"    {name!r}: {(split.training.labels == label).sum()} + {(split.validation.labels == label).sum()}"
        for label, name in enumerate(folder.class_names)
    ]
    if len(lines) > _MAX_CLASSES:
        return [*lines[:_MAX_CLASSES], f"    and {len(lines) - _MAX_CLASSES} more classes"]
    return lines
