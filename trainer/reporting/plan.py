"""The plan of a run, which --dry_run prints: images, steps, network, devices and paths."""

import shlex
from typing import Any

from trainer import cli, config
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
        f"  head        {_head_stage(settings.head_epochs, steps)} over {features} features per image, computed once",
        f"  network     {_epochs(settings.epochs, steps)} over images of {settings.image_size} pixels",
        f"  batch       {_count(settings.batch_size, 'image')} over {_replicas(resolved)}",
        f"  layers      {settings.backbone}, {settings.head} head, softmax over {num_classes} classes: "
        f"{parameters:,} parameters; weights: {settings.weights}",
        f"  input       {settings.image_size} x {settings.image_size} pixels; resize: {settings.resize}; "
        f"preprocessing: {settings.preprocessing}",
        f"  devices     {_devices(resolved)}; XLA {'on' if resolved['xla'] else 'off'}",
        f"  precision   {resolved['precision']}: {resolved['precision_reason']}",
        f"  data_dir    {settings.data_dir}",
        f"  job_dir     {settings.job_dir}",
        f"  SavedModel  {settings.model_dir}",
        f"  TensorBoard {settings.tensorboard_dir}",
        "  flags       " + shlex.join(f"--{name}={value}" for name, value in changed.items()),
        f"start it: {cli.this_command(without='dry_run')}",
    ]
    return "\n".join(lines)


def summary(settings: Config, split: Split, resolved: dict[str, Any], *, worker: int) -> list[str]:
    """The plan in four lines, after that of the images, as a run logs it; `worker` is the index of this one."""
    steps = sampler.steps_per_epoch(len(split.training), settings.batch_size)
    head = "logistic regression" if settings.head_epochs == -1 else _epochs(settings.head_epochs, steps)
    stages = [f"the head, {head}"] if settings.head_epochs else []
    stages += [f"the whole network, {_epochs(settings.epochs, steps)}"] if settings.epochs else []
    here = f"worker {worker + 1} of {resolved['workers']} ({resolved['cluster']}), {_replicas(resolved)}, "
    return [
        f"Training: {', then '.join(stages)} ({resolved['epochs_reason']}).",
        f"Network: {settings.backbone}, weights {settings.weights}, {settings.image_size} x {settings.image_size} pixels, "
        f"batches of {settings.batch_size} images.",
        f"Machine: {here if resolved['workers'] > 1 else ''}{_devices(resolved)}, {resolved['precision']} "
        f"({resolved['precision_reason']}), XLA {'on' if resolved['xla'] else 'off'}.",
        f"Output: {settings.job_dir}. After a stop, the same command resumes.",
    ]


def _epochs(epochs: int, steps: int) -> str:
    """As in `2 epochs of 1 step`."""
    return f"{_count(epochs, 'epoch')} of {_count(steps, 'step')}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _replicas(resolved: dict[str, Any]) -> str:
    return f"{_count(resolved['replicas'], 'replica')} on {_count(resolved['workers'], 'worker')}"


def _devices(resolved: dict[str, Any]) -> str:
    return ", ".join(name.removeprefix("/device:") for name in resolved["devices"])


def _head_stage(head_epochs: int, steps: int) -> str:
    if head_epochs == -1:
        return "logistic regression (on a very large folder 15 epochs)"
    return _epochs(head_epochs, steps)


def _class_lines(folder: Folder, split: Split) -> list[str]:
    lines = [
        f"    {name!r}: {(split.training.labels == label).sum()} + {(split.validation.labels == label).sum()}"
        for label, name in enumerate(folder.class_names)
    ]
    if len(lines) > _MAX_CLASSES:
        return [*lines[:_MAX_CLASSES], f"    and {len(lines) - _MAX_CLASSES} more classes"]
    return lines
