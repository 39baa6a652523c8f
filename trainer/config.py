"""The configuration of a run: one frozen value, checked once.

Each field is a flag of `trainer.task` with the same name. A field carries its default, its help text, its bounds or
choices, whether a resumed run may change it, and whether workers may differ in it; the flags are generated from that.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from absl import flags

from trainer.errors import UserError
from trainer.flag_info import FlagInfo, flag
from trainer.formatting import LANGUAGES

AUGMENT_SWITCH = {"true": "basic", "false": "none"}  # the values of --augment in earlier versions
REMOTE_READ_PARALLELISM = 48  # concurrent requests: at 50 ms each, a thousand objects per second

# What --export_formats may name, and the import names of the packages that each format needs beyond the job's own.
EXPORT_PACKAGES: dict[str, tuple[str, ...]] = {
    "saved_model": (),
    "tflite": ("ai_edge_litert",),
    "tflite_float16": ("ai_edge_litert",),
    "tflite_int8": ("ai_edge_litert",),
    "onnx": ("tf2onnx", "onnx", "onnxruntime"),
}
# Formats to which a backbone cannot be converted, with the reason.
NOT_CONVERTED = {
    ("ConvNeXtTiny", "onnx"): "tf2onnx converts neither its grouped convolutions nor its GELU (operation Erfc)",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run does. Raises UserError for a value outside its bounds and for fields that contradict each other."""

    # data
    data_dir: str = flag(
        "",
        "Folder with one sub-folder of images per class, local or gs://; or the output of trainer.pack; or tfds:NAME or "
        "tfds:NAME@DIR for a TensorFlow Dataset; or demo, a set that the job draws.",
        # Images are compared by content (split.csv), wherever they are stored.
        resumable=True,
        per_worker=True,
    )
    labels: str = flag(
        "",
        "File of paths and labels, in place of folders per class: CSV with the columns path,label and perhaps split,group; "
        "Vertex AI's import file (CSV or JSON Lines); Label Studio's CSV export. Paths are relative to --data_dir (default: "
        "the folder of the file), absolute or gs://.",
        resumable=True,
        per_worker=True,
        in_readme=True,
    )
    accept_layout: bool = flag(
        False,
        "Train although classes are named like parts of a data set (train, test), or although more than a tenth of a class "
        "is also under another label, which stops the job otherwise.",
        resumable=True,
    )
    validation_split: float = flag(
        0.2, "Fraction of each class that is held out for validation, chosen by content.", above=0, below=1
    )
    test_split: float = flag(
        0.0,
        "Fraction of each class that is held out as a test set, by content, before all else. Neither training nor a choice "
        "uses it; the exported model is evaluated on it once, at the end.",
        at_least=0,
        below=1,
        in_readme=True,
    )
    split_file: str = flag(
        "", "The split.csv of an earlier run: its split is used instead of --validation_split.", resumable=True
    )
    group_by: str = flag(
        "none",
        "Which images stay on one side of the split. none: those of equal content; similar: also those that look alike to the "
        "backbone, such as copies and frames of one scene; or a regular expression whose first group (or whole match) in the "
        "path below data_dir names the scene, patient or camera, as in 'scene_([0-9]+)'.",
    )
    image_size: int = flag(
        224,
        "Height and width in pixels of the network's input, 32 or more.",
        at_least=32,
        reason="each backbone reduces its input 32 times",
        in_readme=True,
    )
    resize: str = flag(
        "stretch",
        "How an image becomes a square. stretch: without keeping the aspect ratio; pad: all of the image, with margins; "
        "crop: its central square. The same in training, export and serving.",
        choices=("stretch", "pad", "crop"),
        in_readme=True,
    )
    seed: int = flag(
        0, "Seed of order, augmentation, dropout and random weights: the same seed gives the same run.", at_least=0
    )
    max_bad_fraction: float = flag(
        0.01,
        "Fraction of unreadable files above which the job refuses to start.",
        at_least=0,
        at_most=1,
        resumable=True,
    )
    read_parallelism: int = flag(
        0,
        f"Images read in parallel. 0: {REMOTE_READ_PARALLELISM} from a bucket; from a disk, chosen for this machine.",
        at_least=0,
        at_most=512,
        resumable=True,
        per_worker=True,
    )
    storage_timeout_secs: int = flag(
        300,
        "Seconds for which a bucket that does not answer is retried before the job exits with code 75 (start it again).",
        at_least=1,
        resumable=True,
        per_worker=True,
    )
    cache: str = flag(
        "auto",
        "Where decoded images are kept between epochs of fine-tuning. auto: in memory if they fit in half of what is free.",
        choices=("auto", "memory", "disk", "none"),
        resumable=True,
    )
    cache_dir: str = flag(
        "",
        "Folder for features and decoded images, which jobs can share. Default: in job_dir.",
        resumable=True,
        per_worker=True,
    )
    augment: str = flag(
        "basic",
        "Augmentation in fine-tuning, never in validation or serving. basic: crops and colors; strong: smaller crops, "
        "stronger colors, rotation and erased parts. Both with flips, see --flip.",
        choices=("none", "basic", "strong"),
    )
    flip: str = flag(
        "auto",
        "Whether augmentation flips images left to right. auto: unless the head, on flipped validation images, confuses "
        "classes, as it does where left and right matter (letters, arrows, left and right hands).",
        choices=("auto", "on", "off"),
    )
    # network
    backbone: str = flag(
        "ResNet50",
        "The network below the head, of keras.applications. Smaller and faster than ResNet50: MobileNetV3Large, "
        "EfficientNetV2B0.",
        choices=("ResNet50", "ResNet101", "EfficientNetV2B0", "ConvNeXtTiny", "MobileNetV3Large"),
        in_readme=True,
    )
    weights: str = flag(
        "imagenet",
        "imagenet (downloaded by Keras), none (random), the path of a weights file of the backbone, or the job_dir of an "
        "earlier run.",
        in_readme=True,
    )
    head: str = flag("average", "Layer between the backbone and the softmax layer.", choices=("average", "flatten"))
    preprocessing: str = flag(
        "imagenet",
        "imagenet: as the ImageNet weights of the backbone expect; rescale: multiply by 1/255, as in the article.",
        choices=("imagenet", "rescale"),
    )
    batch_norm: str = flag(
        "auto",
        "Batch-norm statistics in fine-tuning. auto: frozen for pretrained weights, trained for random ones.",
        choices=("auto", "frozen", "train"),
    )
    # 0.9 is the value of torchvision and of the authors of ResNet, who write it as 1 - 0.1.
    batch_norm_momentum: float = flag(
        0.9,
        "Momentum of trained batch-norm statistics. Keras' default, 0.99, needs hundreds of steps to follow the images, and "
        "a small folder has few.",
        at_least=0,
        below=1,
    )
    dropout: float = flag(0.2, "Fraction of features dropped in training.", at_least=0, at_most=0.95)
    summary: bool = flag(False, "Print the network layer by layer.", resumable=True)
    # recipe
    recipe: str = flag(
        "auto",
        "What is trained, in one word. head: the head alone; finetune: then the whole network; auto: finetune on a GPU where "
        "it takes less than an hour, else head; article: the article's recipe. Every other flag overrides it.",
        choices=("auto", "head", "finetune", "article"),
        resumable=True,
        in_readme=True,
    )
    monitor: str = flag(
        "auto",
        "Metric of the validation images that decides which epoch is exported. Of equal epochs the one with the lower "
        "val_loss is exported, or with first_val_accuracy the first. auto: val_accuracy, or with --class_weight=balanced "
        "balanced_accuracy.",
        choices=("auto", "val_accuracy", "val_loss", "balanced_accuracy", "first_val_accuracy"),
    )
    batch_size: int = flag(
        32,
        "Images per step over all workers and devices (the global batch); at most all training images.",
        at_least=1,
        in_readme=True,
    )
    accumulate_steps: str = flag(
        "1",
        "Number of parts in which the batch of each device is computed, one after another, in fine-tuning. The gradients are "
        "those of the whole batch, with less memory and time lost. auto: 1, doubled until it fits. Not with trained batch-norm "
        "statistics, which would be those of the parts.",
        resumable=True,
    )
    head_epochs: int = flag(
        -1,
        "Epochs of the head alone, on features that are computed once. -1: until it is done, by logistic regression or, on "
        "very large folders, 15 epochs.",
        at_least=-1,
        resumable=True,
        in_readme=True,
    )
    epochs: int = flag(
        -1,
        "Epochs of fine-tuning the whole network, after the head. -1: as --recipe decides.",
        at_least=-1,
        resumable=True,
        in_readme=True,
    )
    head_learning_rate: float = flag(1e-3, "Peak learning rate of the head's epochs.", above=0)
    learning_rate: float = flag(
        3e-4,
        "Peak learning rate of fine-tuning. With lamb it is relative: the largest change of a layer in one step, as a "
        "fraction of its weights.",
        above=0,
        in_readme=True,
    )
    optimizer: str = flag(
        "auto",
        "Keras optimizer; sgd has momentum 0.9. auto: lamb to fine-tune pretrained weights, else adam.",
        choices=("auto", "adam", "adamw", "lamb", "sgd"),
    )
    lr_schedule: str = flag(
        "cosine", "Schedule from the peak learning rate; cosine ends at 0.", choices=("constant", "cosine")
    )
    warmup_epochs: float = flag(
        -1.0,
        "Epochs at the start of each stage in which the learning rate rises linearly from 0. -1: a tenth of fine-tuning, "
        "none of the head.",
        at_least=-1,
    )
    weight_decay: float = flag(0.0, "Decoupled weight decay; 0: none (adamw: Keras' 0.004).", at_least=0)
    clip_norm: float = flag(0.0, "Largest norm of the global batch's gradient; 0: no clipping.", at_least=0)
    label_smoothing: float = flag(
        0.0, "Probability that is moved from the true class to all classes.", at_least=0, at_most=0.9
    )
    class_weight: str = flag(
        "none",
        "balanced: examples of rare classes weigh more in the loss.",
        choices=("none", "balanced"),
        in_readme=True,
    )
    early_stopping_patience: int = flag(
        0,
        "Stop a stage after this many epochs without a better --monitor; 0: never.",
        at_least=0,
        resumable=True,
        in_readme=True,
    )
    # machine
    precision: str = flag(
        "auto",
        "auto: the precision that the device computes fast.",
        choices=("auto", "float32", "mixed_float16", "mixed_bfloat16"),
        in_readme=True,
    )
    xla: str = flag(
        "auto",
        "Compile the training step of each replica with XLA. auto: on one GPU.",
        choices=("auto", "on", "off"),
        resumable=True,
    )
    steps_per_loop: int = flag(
        0, "Training steps per call from the host; 0: as many as take about a second.", at_least=0, resumable=True
    )
    worker_timeout_secs: int = flag(
        600,
        "Seconds that a worker waits for the others, at the start or in one call of --steps_per_loop steps, before it exits "
        "with code 75 (start all workers again).",
        at_least=1,
        resumable=True,
        per_worker=True,
    )
    require_gpu: bool = flag(
        False, "Exit with code 2 and a diagnosis if TensorFlow sees no GPU.", resumable=True, in_readme=True
    )
    # output
    job_dir: str = flag(
        "",
        "Folder for everything that the job writes. Default: the parent of AIP_CHECKPOINT_DIR, which Vertex AI sets.",
        resumable=True,
    )
    model_dir: str = flag(
        "",
        "Folder of the SavedModel. Default: AIP_MODEL_DIR, else saved_model in job_dir.",
        resumable=True,
        per_worker=True,
    )
    tensorboard_dir: str = flag(
        "",
        "Folder of the TensorBoard logs. Default: AIP_TENSORBOARD_LOG_DIR, else logs in job_dir.",
        resumable=True,
        per_worker=True,
    )
    export_formats: str = flag(
        "saved_model",
        "Comma-separated: saved_model, which is always written; and tflite, onnx, tflite_float16 (half the size) and "
        "tflite_int8 (a quarter, for integer processors), which go to exports/ in job_dir.",
        resumable=True,
        in_readme=True,
    )
    serving_precision: str = flag(
        "float32",
        "Precision of the network in the SavedModel. bfloat16 is several times faster on processors that compute in it (Intel "
        "AMX), slower on others. It moves the probabilities; the log says by how much.",
        choices=("float32", "bfloat16"),
    )
    language: str = flag(
        "en", "Language of the report: English or Spanish.", choices=LANGUAGES, resumable=True, in_readme=True
    )
    profile_steps: str = flag(
        "",
        "First and last step, as in 10,20, of the first fine-tuning epoch (of the head's with --epochs=0) for which a "
        "TensorFlow profile is written to tensorboard_dir.",
        resumable=True,
    )
    checkpoint_secs: int = flag(
        300,
        "Seconds between checkpoints within an epoch; there is one after each epoch too.",
        at_least=1,
        resumable=True,
    )
    resume: bool = flag(
        True, "Resume the run in job_dir. --noresume refuses a job_dir that holds a run.", resumable=True
    )
    nan_retries: int = flag(
        1,
        "How often a loss that is not finite restores the last checkpoint with half the learning rate.",
        at_least=0,
        resumable=True,
    )
    on_epoch: str = flag(
        "",
        "Shell command that the chief runs after each epoch, with the epoch's row of history.csv as JSON on standard input, "
        "as for an experiment tracker (docs/trackers.md). After 60 seconds it is killed. Its failure is logged.",
        resumable=True,
        per_worker=True,
    )
    price_per_hour: float = flag(
        0.0,
        "Price of one machine, in any currency: the progress line, metrics.json and the report then show the cost.",
        at_least=0,
        resumable=True,
        per_worker=True,
    )
    max_cost: float = flag(
        0.0,
        "Save, export the best weights so far and exit with code 0 when the job has cost this much; 0: no limit.",
        at_least=0,
        resumable=True,
        per_worker=True,
    )
    dry_run: bool = flag(
        False, "Print the plan (images, steps, network, devices, paths) and write nothing.", resumable=True
    )
    log_format: str = flag(
        "auto",
        "json: one JSON object per line, as Cloud Logging reads it. auto: json on Vertex AI and Kubernetes, else text.",
        choices=("auto", "text", "json"),
        resumable=True,
        per_worker=True,
    )
    verbosity: int = flag(0, "", resumable=True, per_worker=True)  # absl defines the flag itself

    def __post_init__(self) -> None:
        """Checks the bounds of each field, then what only several fields together show."""
        for name, info in FLAG_INFO.items():
            info.check(name, getattr(self, name))
        if self.head_epochs == 0 and self.epochs == 0:
            raise UserError(
                "--head_epochs and --epochs are both 0, so nothing would be trained: set one of them above 0."
            )
        if self.head_epochs == 0 and self.epochs == -1 and self.recipe == "head":
            raise UserError(
                "--recipe=head with --head_epochs=0: nothing would be trained. Leave one of them out, or pass --epochs=N."
            )
        if self.head_epochs == -1 and self.head_learning_rate != DEFAULTS["head_learning_rate"]:
            raise UserError(
                f"--head_learning_rate is {self.head_learning_rate}, but the head is fitted without a learning rate: pass "
                "--head_epochs=15 too, or leave it out."
            )
        if self.weights == "none" and self.head_epochs:
            raise UserError(
                f"--weights=none with --head_epochs={self.head_epochs}: a head on features of random weights learns "
                "little. Pass --head_epochs=0 --epochs=N to train the whole network, or pass --weights."
            )
        if self.labels and self.data_dir.startswith("tfds:"):
            raise UserError(f"--labels={self.labels} with --data_dir={self.data_dir}, which has labels: leave out one.")
        if self.test_split and self.group_by == "similar":
            raise UserError(
                f"--test_split={self.test_split:g} with --group_by=similar: images similar to test images would stay in "
                "training. Pass a folder test/, or a regular expression as --group_by."
            )
        if self.test_split and self.split_file:
            raise UserError(
                f"--test_split={self.test_split:g} with --split_file={self.split_file}, which says by itself which images "
                "are test images: leave out one of the two."
            )
        self._check_accumulation()
        self._check_groups()
        if self.max_cost and not self.price_per_hour:
            raise UserError(f"--max_cost is {self.max_cost}, but --price_per_hour is not set: pass both.")
        shortest_stage = min((epochs for epochs in (self.head_epochs, self.epochs) if epochs > 0), default=math.inf)
        if self.warmup_epochs > shortest_stage:
            raise UserError(
                f"--warmup_epochs is {self.warmup_epochs}, longer than a stage of "
                f"--head_epochs={self.head_epochs} --epochs={self.epochs}: pass fewer."
            )
        for name in self.export_formats.split(","):
            if name not in EXPORT_PACKAGES:
                raise UserError(
                    f"--export_formats={self.export_formats} names {name!r}: pass one or more of "
                    f"{', '.join(EXPORT_PACKAGES)}, separated by commas."
                )
            reason = NOT_CONVERTED.get((self.backbone, name))
            if reason:
                raise UserError(
                    f"--export_formats={self.export_formats} with --backbone={self.backbone}: {reason}: leave {name} out, "
                    "or pass another backbone."
                )
        self.profile_range()

    def _check_accumulation(self) -> None:
        parts = self.accumulate_steps
        if parts != "auto" and not (parts.isascii() and parts.isdigit() and int(parts) >= 1):
            raise UserError(f"--accumulate_steps is {parts!r}: pass auto, or a number of at least 1.")
        trains_statistics = self.batch_norm == "train" or (self.batch_norm == "auto" and self.weights == "none")
        if parts != "1" and trains_statistics:
            raise UserError(
                f"--accumulate_steps={parts} with trained batch-norm statistics, which would be those of the parts and not "
                "of the batch: pass --batch_norm=frozen, or leave it out."
            )

    def _check_groups(self) -> None:
        if self.group_by == "none":
            return
        try:
            re.compile(self.group_by)
        except re.error as error:
            raise UserError(
                f"--group_by={self.group_by} is not a regular expression ({error}): pass one that finds the name of the "
                "scene, patient or camera in a path, or none, or similar."
            ) from None
        if self.group_by == "similar" and not self.head_epochs:
            raise UserError(
                "--group_by=similar with --head_epochs=0: what looks alike is found by the features of the head, which are "
                "not computed then. Leave one of them out, or pass a regular expression."
            )
        if self.split_file:
            raise UserError(
                f"--group_by={self.group_by}, but --split_file={self.split_file} is the split: leave one of them out."
            )

    @property
    def monitored_metric(self) -> str:
        """The metric that decides which epoch is exported: --monitor, resolved."""
        if self.monitor != "auto":
            return self.monitor
        return "balanced_accuracy" if self.class_weight == "balanced" else "val_accuracy"

    def profile_range(self) -> tuple[int, int] | None:
        """First and last step of --profile_steps, counted from 1; None if it is not set. Raises UserError."""
        if not self.profile_steps:
            return None
        words = self.profile_steps.split(",")
        if len(words) != 2 or not all(word.isdigit() for word in words) or not 1 <= int(words[0]) <= int(words[1]):
            raise UserError(
                f"--profile_steps is {self.profile_steps!r}: pass the first and the last step of an epoch, as in 10,20."
            )
        return int(words[0]), int(words[1])

    def as_dict(self) -> dict[str, str | int | float | bool]:
        """Every field with its value, as config.json holds them."""
        return dataclasses.asdict(self)


_FIELDS = dataclasses.fields(Config)
FLAG_INFO: dict[str, FlagInfo] = {field.name: field.metadata["flag"] for field in _FIELDS}
DEFAULTS: dict[str, Any] = {field.name: field.default for field in _FIELDS}
MAY_CHANGE_ON_RESUME = frozenset(name for name, info in FLAG_INFO.items() if info.resumable)
MAY_DIFFER_BETWEEN_WORKERS = frozenset(name for name, info in FLAG_INFO.items() if info.per_worker)
# What distinguishes the recipes of two runs, as TensorBoard compares them.
HYPERPARAMETERS = (*(name for name in DEFAULTS if name not in MAY_CHANGE_ON_RESUME), "head_epochs", "epochs")


class _AugmentFlag(flags.EnumFlag):
    """--augment=none|basic|strong, also as --augment and --noaugment, the switch that it was in earlier versions."""

    def __init__(self, name: str, default: str, help_text: str, choices: list[str]):
        super().__init__(name, default, help_text, choices)
        self.boolean = True  # absl then accepts the name without a value, and with `no` in front

    def _parse(self, argument: Any) -> Any:
        return super()._parse(AUGMENT_SWITCH.get(argument, argument))


def define_flags(values: flags.FlagValues) -> None:
    """Defines one absl flag for each field of Config in `values`, but for verbosity, which absl defines itself.

    Bounds are checked by Config, so that Python callers and the command line get the same message.
    """
    defines: dict[type, Callable] = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for name, info in FLAG_INFO.items():
        if name == "verbosity":
            continue
        if name == "augment":
            flags.DEFINE_flag(_AugmentFlag(name, DEFAULTS[name], info.help, list(info.choices)), flag_values=values)
        elif info.choices:
            flags.DEFINE_enum(name, DEFAULTS[name], list(info.choices), info.help, flag_values=values)
        else:
            defines[type(DEFAULTS[name])](name, DEFAULTS[name], info.help, flag_values=values)
