"""The Config of a run: one frozen value, checked once. Every flag of `trainer.task` is a field here, by name and default."""

import dataclasses
import math
from typing import Any

from trainer.errors import UserError

MINIMUM_IMAGE_SIZE = 32  # pixels; ResNet50 shrinks its input 32 times

# What --export_formats may name, and the packages, by what they are imported as, that each takes beyond the job's own.
EXPORT_PACKAGES = {
    "saved_model": (),
    "tflite": ("ai_edge_litert",),
    "onnx": ("tf2onnx", "onnx", "onnxruntime"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. The flags of `trainer.task` explain each field."""

    # pictures
    data_dir: str = ""
    validation_split: float = 0.2
    split_file: str = ""
    image_size: int = 224
    seed: int = 0
    max_bad_fraction: float = 0.01
    read_parallelism: int = 0
    storage_timeout_secs: int = 300
    cache: str = "auto"
    cache_dir: str = ""
    augment: bool = True
    # network
    weights: str = "imagenet"
    head: str = "average"
    preprocessing: str = "imagenet"
    batch_norm: str = "auto"
    dropout: float = 0.2
    summary: bool = False
    # recipe
    batch_size: int = 32
    head_epochs: int = 15
    epochs: int = 0
    head_learning_rate: float = 1e-3
    learning_rate: float = 3e-7
    optimizer: str = "adam"
    lr_schedule: str = "cosine"
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    label_smoothing: float = 0.0
    class_weight: str = "none"
    early_stopping_patience: int = 0
    # machine
    precision: str = "auto"
    xla: str = "auto"
    steps_per_loop: int = 0
    require_gpu: bool = False
    # output
    job_dir: str = ""
    model_dir: str = ""
    tensorboard_dir: str = ""
    export_formats: str = "saved_model"
    profile_steps: str = ""
    checkpoint_secs: int = 300
    resume: bool = True
    nan_retries: int = 1
    price_per_hour: float = 0.0
    max_cost: float = 0.0
    dry_run: bool = False
    log_format: str = "auto"
    verbosity: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for what no flag's own bounds can see: numbers that are not finite, fields that contradict."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{field.name} is {value}: pass a finite number.")
        for name in ("learning_rate", "head_learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} is {getattr(self, name)}: nothing would be learned; pass a number above 0.")
        if not 0 < self.validation_split < 1:
            raise UserError(
                f"--validation_split is {self.validation_split}: pass the share of pictures held out, above 0 and below 1."
            )
        if self.image_size < MINIMUM_IMAGE_SIZE:
            raise UserError(
                f"--image_size is {self.image_size}, but ResNet50 shrinks its input 32 times: "
                f"pass {MINIMUM_IMAGE_SIZE} or more."
            )
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}: pass the pictures per step, 1 or more.")
        if self.head_epochs + self.epochs == 0:
            raise UserError("--head_epochs and --epochs are both 0: nothing would be trained; set one of them above 0.")
        if self.weights == "none" and self.head_epochs:
            raise UserError(
                f"--weights=none with --head_epochs={self.head_epochs}: a head on features of random weights learns "
                "little; pass --head_epochs=0 --epochs=N to train the whole network, or give --weights."
            )
        profile_range(self)
        if self.max_cost and not self.price_per_hour:
            raise UserError(
                f"--max_cost is {self.max_cost}, but no --price_per_hour tells what a machine costs: pass both."
            )
        if self.warmup_epochs and self.warmup_epochs > min(n for n in (self.head_epochs, self.epochs) if n):
            raise UserError(
                f"--warmup_epochs is {self.warmup_epochs}, longer than a stage of "
                f"--head_epochs={self.head_epochs} --epochs={self.epochs}: pass fewer."
            )

        for name in self.export_formats.split(","):
            if name not in EXPORT_PACKAGES:
                raise UserError(
                    f"--export_formats={self.export_formats} names {name!r}: pass {', '.join(EXPORT_PACKAGES)}, or "
                    "several with commas between them."
                )

    def as_dict(self) -> dict[str, str | int | float | bool]:
        """Every field with its value, as config.json holds them."""
        return dataclasses.asdict(self)


DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}

# A run that goes on in its job_dir may change these and is still the same run: they say where and how, not what.
# data_dir is among them because the pictures are compared by content (split.csv), wherever they lie.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        *(
            "data_dir",
            "split_file",
            "job_dir",
            "model_dir",
            "tensorboard_dir",
            "export_formats",
            "profile_steps",
            "cache",
            "cache_dir",
            "summary",
            "max_bad_fraction",
            "read_parallelism",
            "storage_timeout_secs",
        ),
        *("head_epochs", "epochs", "early_stopping_patience", "xla", "steps_per_loop", "require_gpu"),
        *(
            "checkpoint_secs",
            "resume",
            "nan_retries",
            "price_per_hour",
            "max_cost",
            "dry_run",
            "log_format",
            "verbosity",
        ),
    }
)

# What tells two runs' recipes apart, as TensorBoard compares them.
HYPERPARAMETERS = (*(name for name in DEFAULTS if name not in MAY_CHANGE_ON_RESUME), "head_epochs", "epochs")

# Workers may differ in these: where each finds things on its own disk, and how much it says.
MAY_DIFFER_BETWEEN_WORKERS = frozenset(
    {
        *("data_dir", "cache_dir", "model_dir", "tensorboard_dir", "price_per_hour", "max_cost", "log_format"),
        *("verbosity", "read_parallelism", "storage_timeout_secs"),
    }
)


def profile_range(settings: Config) -> tuple[int, int] | None:
    """The first and the last step of --profile_steps=a,b, None without it. Raises UserError if it is no such pair."""
    if not settings.profile_steps:
        return None
    words = settings.profile_steps.split(",")
    if len(words) != 2 or not all(word.isdigit() for word in words) or not 1 <= int(words[0]) <= int(words[1]):
        raise UserError(
            f"--profile_steps is {settings.profile_steps!r}: pass the first and the last step of an epoch, as in 10,20."
        )
    return int(words[0]), int(words[1])


def replace(settings: Config, **values: Any) -> Config:
    """The same Config but for those fields."""
    return dataclasses.replace(settings, **values)


def changes(before: dict, now: dict) -> list[str]:
    """The fields of two Config.as_dict() that differ and make another run of it, as `name: before -> now`."""
    return [
        f"{name}: {before.get(name)} -> {now[name]}"
        for name in now
        if name not in MAY_CHANGE_ON_RESUME and before.get(name) != now[name]
    ]
