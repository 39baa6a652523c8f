"""The flags of trainer.task: each is a field of Config, with its default from there."""

from absl import flags

from trainer import examples
from trainer.config import Config


def define() -> None:
    """One flag for each field of Config, with its default."""
    _define_those_of_pictures()
    _define_those_of_network()
    _define_those_of_recipe()
    _define_those_of_machine()
    _define_those_of_output()


def _define_those_of_pictures() -> None:
    flags.DEFINE_string(
        "data_dir",
        Config.data_dir,
        "Folder with one sub-folder of pictures per class, local or gs://; or what trainer.pack left; or tfds:NAME, "
        "tfds:NAME@DIR of TensorFlow Datasets. Without it, a demo set is drawn.",
    )
    flags.DEFINE_float(
        "validation_split", Config.validation_split, "Share of each class that is held out to validate, by content."
    )
    flags.DEFINE_string(
        "split_file",
        Config.split_file,
        "A split.csv of an earlier run: its split is used, instead of --validation_split.",
    )
    flags.DEFINE_integer("image_size", Config.image_size, "Pixels to a side of what the network sees; 32 or more.")
    flags.DEFINE_integer(
        "seed", Config.seed, "Of order, augmentation, dropout and fresh weights: same seed, same run.", lower_bound=0
    )
    flags.DEFINE_float(
        "max_bad_fraction",
        Config.max_bad_fraction,
        "Share of unreadable files above which the job refuses to start.",
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_integer(
        "read_parallelism",
        Config.read_parallelism,
        f"Pictures read at once. 0: {examples.REMOTE_PARALLELISM} of a bucket, of a disk what suits the machine.",
        lower_bound=0,
        upper_bound=512,
    )
    flags.DEFINE_integer(
        "storage_timeout_secs",
        Config.storage_timeout_secs,
        "How long to keep asking a bucket that does not answer before the job ends (exit code 75: start it again).",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "cache",
        Config.cache,
        ["auto", "memory", "disk", "none"],
        "Where decoded pictures stay between the epochs of fine-tuning. auto: in memory if they fit half of what is free.",
    )
    flags.DEFINE_string(
        "cache_dir",
        Config.cache_dir,
        "Folder for features and decoded pictures, to share between jobs. Default: in job_dir.",
    )
    flags.DEFINE_boolean(
        "augment", Config.augment, "Random crops, flips and colours in fine-tuning; never in validation or serving."
    )


def _define_those_of_network() -> None:
    flags.DEFINE_string(
        "weights",
        Config.weights,
        "imagenet (downloaded by Keras), none (random), or the path of a weights file of "
        "ResNet50 or of an earlier run.",
    )
    flags.DEFINE_enum("head", Config.head, ["average", "flatten"], "What is between ResNet50 and the softmax layer.")
    flags.DEFINE_enum(
        "preprocessing",
        Config.preprocessing,
        ["imagenet", "rescale"],
        "imagenet: as Keras' weights expect; rescale: times 1/255, as in the article.",
    )
    flags.DEFINE_enum(
        "batch_norm",
        Config.batch_norm,
        ["auto", "frozen", "train"],
        "The batch statistics in fine-tuning. auto: frozen on given weights, trained from random ones.",
    )
    flags.DEFINE_float(
        "dropout", Config.dropout, "Share of features dropped in training.", lower_bound=0, upper_bound=0.95
    )
    flags.DEFINE_boolean("summary", Config.summary, "Print the network, layer by layer.")


def _define_those_of_recipe() -> None:
    flags.DEFINE_integer("batch_size", Config.batch_size, "Pictures per step over all workers and devices.")
    flags.DEFINE_integer(
        "head_epochs", Config.head_epochs, "Epochs of the head alone, on features computed once.", lower_bound=0
    )
    flags.DEFINE_integer("epochs", Config.epochs, "Epochs of the whole network after that.", lower_bound=0)
    flags.DEFINE_float("head_learning_rate", Config.head_learning_rate, "Peak learning rate of the head's epochs.")
    flags.DEFINE_float("learning_rate", Config.learning_rate, "Peak learning rate of the whole network's epochs.")
    flags.DEFINE_enum(
        "optimizer", Config.optimizer, ["adam", "adamw", "sgd"], "Keras optimizer; sgd with momentum 0.9."
    )
    flags.DEFINE_enum(
        "lr_schedule", Config.lr_schedule, ["constant", "cosine"], "From the peak learning rate on; cosine ends at 0."
    )
    flags.DEFINE_float(
        "warmup_epochs",
        Config.warmup_epochs,
        "Epochs of each stage in which the learning rate rises from 0.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "weight_decay", Config.weight_decay, "Decoupled weight decay; 0: none (adamw: Keras' 0.004).", lower_bound=0
    )
    flags.DEFINE_float(
        "clip_norm", Config.clip_norm, "Bound on the norm of the global batch's gradient; 0: none.", lower_bound=0
    )
    flags.DEFINE_float(
        "label_smoothing",
        Config.label_smoothing,
        "Probability taken from the true class and spread.",
        lower_bound=0,
        upper_bound=0.9,
    )
    flags.DEFINE_enum(
        "class_weight", Config.class_weight, ["none", "balanced"], "balanced: rare classes count for more."
    )
    flags.DEFINE_integer(
        "early_stopping_patience",
        Config.early_stopping_patience,
        "End a stage after so many epochs without a better val_accuracy; 0: never.",
        lower_bound=0,
    )


def _define_those_of_machine() -> None:
    flags.DEFINE_enum(
        "precision",
        Config.precision,
        ["auto", "float32", "mixed_float16", "mixed_bfloat16"],
        "auto: what the device computes fast.",
    )
    flags.DEFINE_enum(
        "xla", Config.xla, ["auto", "on", "off"], "Compile each replica's pass with XLA. auto: on one GPU."
    )
    flags.DEFINE_integer(
        "steps_per_loop",
        Config.steps_per_loop,
        "Steps per round trip to the host; 0: about a second's worth.",
        lower_bound=0,
    )
    flags.DEFINE_boolean(
        "require_gpu", Config.require_gpu, "End with exit code 2 and a diagnosis if TensorFlow sees no GPU."
    )


def _define_those_of_output() -> None:
    flags.DEFINE_string(
        "job_dir",
        Config.job_dir,
        "Folder for all that the job leaves. Default: beside AIP_CHECKPOINT_DIR, as Vertex AI sets it.",
    )
    flags.DEFINE_string(
        "model_dir", Config.model_dir, "Folder of the SavedModel. Default: AIP_MODEL_DIR, else saved_model in job_dir."
    )
    flags.DEFINE_string(
        "tensorboard_dir", Config.tensorboard_dir, "Default: AIP_TENSORBOARD_LOG_DIR, else logs in job_dir."
    )
    flags.DEFINE_string(
        "export_formats",
        Config.export_formats,
        "saved_model, which is always there, and with commas tflite and onnx, into exports/ in job_dir.",
    )
    flags.DEFINE_string(
        "profile_steps",
        Config.profile_steps,
        "First and last step, as in 10,20, of the whole network's first epoch (or of the head's, with --epochs=0) to write "
        "a TensorFlow profile of, for TensorBoard.",
    )
    flags.DEFINE_integer(
        "checkpoint_secs", Config.checkpoint_secs, "Save within an epoch after so many seconds.", lower_bound=1
    )
    flags.DEFINE_boolean(
        "resume", Config.resume, "Go on with the run in job_dir. --noresume refuses a job_dir that holds one."
    )
    flags.DEFINE_integer(
        "nan_retries",
        Config.nan_retries,
        "How often to go back to the last save with half the learning rate when the loss is no number any more.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "price_per_hour",
        Config.price_per_hour,
        "Of one machine, in any currency: progress line, metrics.json and report then tell the cost.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "max_cost",
        Config.max_cost,
        "Save, export the best weights so far and end (exit code 0) when the job has cost so much; 0: no limit.",
        lower_bound=0,
    )
    flags.DEFINE_boolean(
        "dry_run", Config.dry_run, "Show the plan (pictures, steps, network, devices, paths) and write nothing."
    )
    flags.DEFINE_enum(
        "log_format",
        Config.log_format,
        ["auto", "text", "json"],
        "json: lines as Cloud Logging reads them. auto: json on Vertex AI and Kubernetes, else text.",
    )
