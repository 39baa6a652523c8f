"""What a run would do, told before it does it."""

import shlex

from trainer import config
from trainer.config import Config
from trainer.data import sampler
from trainer.data.dataset import Folder, Split

RESNET50_PARAMETERS = 23_587_712  # keras.applications.ResNet50(include_top=False), its 53,120 batch statistics included


FEATURES_PER_CELL = 2048


CLASSES_SHOWN = 30


def describe(settings: Config, folder: Folder, split: Split, resolved: dict) -> str:
    """The plan as text: pictures, steps, network, devices, paths, flags that differ from their defaults."""
    training, validation = len(split.training), len(split.validation)
    steps = sampler.steps_per_epoch(training, settings.batch_size)
    cells = 1 if settings.head == "average" else (-(-settings.image_size // 32)) ** 2
    features = FEATURES_PER_CELL * cells
    parameters = RESNET50_PARAMETERS + (features + 1) * len(folder.class_names)
    differing = {n: v for n, v in settings.as_dict().items() if v != config.DEFAULTS[n]}
    lines = [
        "Plan (nothing is written):",
        f"  pictures    {training} to train on, {validation} to validate, {len(folder.bad_files)} bad files left out",
        f"  split       {resolved['split']}",
        *_class_lines(folder, split),
        f"  stage head  {settings.head_epochs} epochs of {steps} steps over {features} features per picture, computed once",
        f"  stage all   {settings.epochs} epochs of {steps} steps over pictures of {settings.image_size} pixels",
        f"  batch       {settings.batch_size} pictures over {resolved['replicas']} replicas of {resolved['workers']} workers",
        f"  network     ResNet50, {settings.head} head, softmax over {len(folder.class_names)} classes: "
        f"{parameters:,} parameters; weights: {settings.weights}",
        f"  devices     {', '.join(resolved['devices'])}; XLA {'on' if resolved['xla'] else 'off'}",
        f"  precision   {resolved['precision']}: {resolved['precision_reason']}",
        f"  reads       {settings.data_dir}",
        f"  job_dir     {settings.job_dir}",
        f"  SavedModel  {settings.model_dir}",
        f"  TensorBoard {settings.tensorboard_dir}",
        "  flags       " + shlex.join(f"--{name}={value}" for name, value in differing.items()),
    ]
    return "\n".join(lines)


def _class_lines(folder: Folder, split: Split) -> list[str]:
    lines = [
        f"    {name!r}: {(split.training.labels == label).sum()} + {(split.validation.labels == label).sum()}"
        for label, name in enumerate(folder.class_names)
    ]
    return lines[:CLASSES_SHOWN] + (
        [f"    and {len(lines) - CLASSES_SHOWN} more classes"] if lines[CLASSES_SHOWN:] else []
    )
