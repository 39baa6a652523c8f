"""Trains a classifier on a folder of images, one sub-folder per class, and exports it ready to serve.

    python -m trainer.task --data_dir=pictures --job_dir=job
        trains a head on ImageNet features, which are computed once: minutes, also on a laptop
    python -m trainer.task --data_dir=pictures --job_dir=job --epochs=5
        then fine-tunes the whole network
    python -m trainer.task --data_dir=pictures --job_dir=job --dry_run
        shows the plan and writes nothing
    python -m trainer.task --flagfile=article --data_dir=pictures --job_dir=job
        the recipe of the article that this project grew out of

Started again with the same flags, an interrupted job resumes; a finished one only says so.
Exit codes: 0 done; 2 you must change something, as the error says; 143 stopped by a signal after saving, start it again;
75 a worker or the network is gone, start it again; any other code is unexpected, and a restart may succeed.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags, logging

from trainer import cli, config, earlier_runs, recipes
from trainer.artifacts import job_dir
from trainer.artifacts.job_dir import JobDir
from trainer.config import Config
from trainer.data import label_file, sampler, splits
from trainer.data.dataset import Folder, Split, check_layout, read_folder
from trainer.errors import UserError
from trainer.reporting import epoch_command, tuner_metrics
from trainer.runtime import cluster
from trainer.runtime.signals import StopRequest, StopSignal
from trainer.storage import files, preflight
from trainer.training.interruption import TrainingInterrupted

ADDRESS_TIMEOUT_SECS = 300  # for the names of the other workers to resolve
DEMO = "demo"  # the --data_dir that is drawn
DEMO_IMAGES_PER_CLASS = 160


@dataclasses.dataclass(frozen=True, eq=False)
class Host:
    """What a job uses of the program that runs it: this command, or a program that calls trainer.train.

    `environment` says whether the job is one of several workers, and a trial of a tuner. `make_stop` is called when the data
    is read, and what it returns then asks the job to stop. The other fields are those of PreparedJob.
    """

    environment: Mapping[str, str]
    make_stop: Callable[[], StopRequest]
    on_lock_lost: Callable[[], None]
    started_at: float
    on_epoch: Callable[[dict[str, Any]], None] | None = None  # in place of --on_epoch


def define_flags() -> None:
    """Defines the flags of this command, so that --help lists them as its own."""
    config.define_flags(flags.FLAGS)
    flags.adopt_module_key_flags(config)


def main(arguments: list[str]) -> int:
    """Runs the job that the flags describe; returns its exit code."""
    if arguments:
        raise UserError(
            f"{arguments[0]!r} is not a flag: write --name=value, or --data_dir={arguments[0]} if it is the folder."
        )
    values = recipes.with_recipe(cli.flag_values(config.DEFAULTS), cli.given_flags(config.DEFAULTS))
    return run(with_environment(Config(**values), os.environ))


def with_environment(settings: Config, environment: Mapping[str, str]) -> Config:
    """Fills in paths that no flag gave: from what Vertex AI sets, else below job_dir. Raises UserError without a job_dir."""
    settings = dataclasses.replace(settings, data_dir=label_file.data_dir_for(settings.labels, settings.data_dir))
    root = settings.job_dir.rstrip("/")
    if not root and environment.get("AIP_CHECKPOINT_DIR"):
        root = os.path.dirname(environment["AIP_CHECKPOINT_DIR"].rstrip("/"))
    if not settings.data_dir and not root:
        settings = dataclasses.replace(settings, data_dir=DEMO)
    if not settings.data_dir:
        raise UserError(_missing_data_dir(JobDir(root)))
    if not root and settings.data_dir != DEMO:
        raise UserError("--job_dir is not set: pass the folder for everything that the job writes.")
    paths = JobDir(root or job_dir.DEFAULT_NAME)
    model_dir = settings.model_dir or environment.get("AIP_MODEL_DIR", "")
    tensorboard_dir = settings.tensorboard_dir or environment.get("AIP_TENSORBOARD_LOG_DIR", "")
    return dataclasses.replace(
        settings,
        job_dir=paths.root,
        model_dir=model_dir.rstrip("/") or paths.saved_model,
        tensorboard_dir=tensorboard_dir.rstrip("/") or paths.logs,
    )


def _missing_data_dir(paths: JobDir) -> str:
    """What to do without --data_dir: the folder of the run in job_dir is known, if there is one."""
    before = paths.read_config()
    known = f", for example --data_dir={before['flags'].get('data_dir')}, the folder of the run there" if before else ""
    return (
        f"--data_dir is not set: pass the folder with one sub-folder of images per class{known}; or --data_dir={DEMO}, "
        "which draws a demo set."
    )


def run(settings: Config, *, build_network: Callable | None = None) -> int:
    """Runs the job as this command, with its signals and its environment; prints the result and returns the exit code.

    `build_network` replaces models.networks.build; it takes the same arguments.
    """
    import psutil  # not at the top: on Windows, where it imports other modules, the command answers before this

    host = Host(
        environment=os.environ,
        make_stop=functools.partial(StopSignal, exit_code=cli.EXIT_STOPPED),
        on_lock_lost=functools.partial(cli.exit_at_once, cli.EXIT_RETRY),
        started_at=psutil.Process().create_time(),
    )
    try:
        result = prepare_and_run(settings, host, build_network=build_network)
    except TrainingInterrupted:
        logging.warning("Stopped; everything is saved in %s. The same command resumes the run.", settings.job_dir)
        return cli.EXIT_STOPPED
    if result:
        print(result, flush=True)
    return 0


def prepare_and_run(settings: Config, host: Host, *, build_network: Callable | None = None) -> str:
    """Prepares and runs the job: data, earlier run, TensorFlow, training, export. Returns and raises as job.run."""
    this_worker = cluster.resolve(host.environment)
    _check_export_packages(settings.export_formats)
    with tempfile.TemporaryDirectory() as temporary:
        if settings.data_dir == DEMO:
            settings = _with_demo_images(settings, temporary)
        elif settings.data_dir.startswith("tfds:"):
            settings = _with_tfds_images(settings, temporary)
        is_writing = this_worker.is_chief and not settings.dry_run
        _check_buckets(settings, is_writing=is_writing)
        settings = dataclasses.replace(settings, weights=_weights_file(settings.weights))
        folder = read_folder(
            settings.data_dir,
            max_bad_fraction=settings.max_bad_fraction,
            progress=cli.shows_bars(),
            read_parallelism=settings.read_parallelism,
            labels_file=settings.labels,
        )
        check_layout(settings.data_dir, folder, accept_layout=settings.accept_layout)
        how_to_split = {
            name: getattr(settings, name) for name in ("validation_split", "test_split", "split_file", "group_by")
        }
        recorded = _recorded_split(settings, folder)
        split = recorded or splits.choose(folder, **how_to_split)
        origin = splits.describe(folder, **how_to_split)
        settings = _with_batch_that_fits(settings, len(split.training))
        profile_range = _checked_profile_range(settings, len(split.training))
        fingerprint = splits.fingerprint(split, folder.class_names)
        settings = _with_earlier_flags(settings, fingerprint, split, folder.class_names)
        if is_writing:
            preflight.check_local_directory(settings.job_dir, flag="job_dir")
        logging.info("Images: %s.", _describe_images(folder, split, origin))
        stop = host.make_stop()
        cli.import_tensorflow()
        if this_worker.workers > 1 or "TF_CONFIG" in host.environment:
            os.environ |= cluster.tensorflow_environment(this_worker)
        cluster.check_addresses(this_worker, timeout_secs=ADDRESS_TIMEOUT_SECS)

        from trainer import job  # imports TensorFlow
        from trainer.prepared_job import PreparedJob

        num_gpus = job.devices.count_gpus() * this_worker.workers
        decision = recipes.decide(settings, num_training=len(split.training), num_gpus=num_gpus)
        prepared = PreparedJob(
            settings=dataclasses.replace(settings, epochs=decision.epochs),
            epochs_reason=decision.reason,
            cluster=this_worker,
            folder=folder,
            split=split,
            split_origin=origin,
            fingerprint=fingerprint,
            profile_range=profile_range,
            started_at=host.started_at,
            stop=stop,
            report_metrics=tuner_metrics.make_reporter(host.environment),
            on_epoch=host.on_epoch or epoch_command.make_runner(settings.on_epoch, settings.job_dir),
            on_lock_lost=host.on_lock_lost,
            build_network=build_network or job.networks.build,
            is_split_final=settings.group_by != "similar" or recorded is not None,
        )
        return job.run(prepared)


def _describe_images(folder: Folder, split: Split, origin: str) -> str:
    purposes = zip(split, ("to train on", "to validate", "to test"), strict=True)
    counts = ", ".join(f"{len(side)} {purpose}" for side, purpose in purposes if len(side))
    left_out = f", {len(folder.bad_files)} bad files left out" if folder.bad_files else ""
    return f"{counts}, of {len(folder.class_names)} classes{left_out} ({origin})"


def _recorded_split(settings: Config, folder: Folder) -> Split | None:
    """With --group_by=similar, the split of the run in job_dir, which is not computed again; None without one.

    Also None if images were added, so that the resume is refused.
    """
    paths = JobDir(settings.job_dir)
    if settings.group_by != "similar" or not (paths.has_progress() and files.exists(paths.split)):
        return None
    split = splits.choose(folder, validation_split=settings.validation_split, split_file=paths.split)
    return split if sum(map(len, split)) == len(folder.examples) else None


def _check_export_packages(export_formats: str) -> None:
    """Raises UserError now, and not after hours of training, if the packages of a format are not installed."""
    for name in export_formats.split(","):
        missing = [package for package in config.EXPORT_PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"--export_formats={export_formats}: {name} needs packages that are not installed "
                f"({', '.join(missing)}): pip install {' '.join(missing)}, or leave {name} out."
            )


def _with_demo_images(settings: Config, temporary: str) -> Config:
    from trainer.data import synthetic

    if os.path.exists(DEMO):
        raise UserError(
            f"--data_dir={DEMO} draws a demo set, and there is also a folder {DEMO}: pass --data_dir=./{DEMO} for the folder."
        )
    paths = JobDir(settings.job_dir)
    before = paths.read_config()
    is_demo = before and os.path.basename(before["flags"].get("data_dir", "")) == os.path.basename(paths.demo_images)
    if before and paths.has_progress() and not is_demo:
        raise UserError(
            f"{settings.job_dir} holds a run on {before['flags'].get('data_dir')}: pass another --job_dir for the demo, or "
            "that --data_dir."
        )
    is_kept = not settings.dry_run and not files.is_remote(settings.job_dir)
    if is_kept:
        preflight.check_local_directory(settings.job_dir, flag="job_dir")
    data_dir = paths.demo_images if is_kept else JobDir(temporary).demo_images
    logging.info("Drawing the demo set (discs, rings and stars) in %s.", data_dir)
    synthetic.draw(data_dir, images_per_class=DEMO_IMAGES_PER_CLASS)
    return dataclasses.replace(settings, data_dir=data_dir)


def _with_tfds_images(settings: Config, temporary: str) -> Config:
    from trainer.data import tfds

    is_kept = not settings.dry_run and not files.is_remote(settings.job_dir)
    parent = settings.cache_dir or (settings.job_dir if is_kept else temporary)
    name = re.sub(r"[^\w.-]+", "_", settings.data_dir)
    directory = files.join(temporary if files.is_remote(parent) else parent, name)
    tfds.write_folder(settings.data_dir, directory)
    return dataclasses.replace(settings, data_dir=directory)


def _check_buckets(settings: Config, *, is_writing: bool) -> None:
    """Raises UserError if a bucket cannot be read or written. Paths below job_dir are covered by job_dir itself."""
    flag_names = ["job_dir", "model_dir", "tensorboard_dir", "cache_dir"]
    outputs = {name: getattr(settings, name) for name in flag_names}
    outputs = {name: path for name, path in outputs.items() if not path.startswith(settings.job_dir + "/")}
    inputs = {name: getattr(settings, name) for name in ("data_dir", "labels", "weights", "split_file")}
    inputs = {name: path for name, path in inputs.items() if not path.startswith(settings.job_dir + "/")}
    preflight.check_buckets(
        read=inputs if is_writing else {**inputs, **outputs},
        written=outputs if is_writing else {},
        timeout_secs=settings.storage_timeout_secs,
    )


def _weights_file(weights: str) -> str:
    """The value of --weights, with the file of best weights in place of a job_dir.

    Raises UserError, before TensorFlow's import, if the file does not exist.
    """
    if weights in ("imagenet", "none"):
        return weights
    paths = JobDir(weights.rstrip("/"))
    path = paths.best_weights if files.exists(paths.config) else weights
    if not files.exists(path):
        raise UserError(
            f"--weights={path} does not exist: pass imagenet, none, the path of a weights file, or the job_dir of an "
            "earlier run."
        )
    return path


def _with_batch_that_fits(settings: Config, num_training: int) -> Config:
    """The flags with a batch of at most all training images. A resumed run gets the same, since its images are the same."""
    if settings.batch_size <= num_training:
        return settings
    logging.info(
        "--batch_size=%d is more than the %d training images: the batch is all of them.",
        settings.batch_size,
        num_training,
    )
    return dataclasses.replace(settings, batch_size=num_training)


def _checked_profile_range(settings: Config, num_training: int) -> tuple[int, int] | None:
    """The range of --profile_steps. Raises UserError if it is larger than the training images allow."""
    steps, profile_range = sampler.steps_per_epoch(num_training, settings.batch_size), settings.profile_range()
    if profile_range and profile_range[1] > steps:
        raise UserError(
            f"--profile_steps={settings.profile_steps}, but an epoch has {steps} steps: pass lower numbers."
        )
    return profile_range


def _with_earlier_flags(settings: Config, fingerprint: str, split: Split, class_names: tuple[str, ...]) -> Config:
    """The flags with which a run in job_dir resumes; the given ones if there is none.

    Flags that are not set keep the values that the run began with: the epochs that --recipe decided, perhaps on another
    machine, and the defaults of an earlier version. Raises UserError if job_dir holds a run of other flags or images, or
    any run and --noresume. A run that ended before it saved anything, for example because its weights could not be
    downloaded, does not count.
    """
    paths = JobDir(settings.job_dir)
    files.check_links(settings.job_dir)
    before = paths.read_config(job_dir.FLAGS_OF_A_RUN)
    if before is None:
        return settings
    if not paths.has_progress():
        logging.info(
            "The run in %s ended before its first checkpoint: it restarts from scratch with the current flags.",
            settings.job_dir,
        )
        return settings
    if not settings.resume:
        raise UserError(f"{settings.job_dir} holds a run and --noresume is set: pass another --job_dir.")
    settings = earlier_runs.with_earlier_defaults(settings, before)
    if settings.epochs == -1 and before["flags"].get("recipe") == settings.recipe:
        settings = dataclasses.replace(settings, epochs=before["flags"]["epochs"])
    differences = earlier_runs.changes(before["flags"], settings.as_dict())
    if differences:
        raise UserError(
            f"{settings.job_dir} holds a run with other flags ({'; '.join(differences)}): pass another --job_dir, or the "
            "flags of that run."
        )
    if before.get("fingerprint") != fingerprint:
        changed = "its split.csv, which lists them, is gone"
        if files.exists(paths.split):
            changed = splits.describe_changes(paths.split, split, class_names)
        raise UserError(
            f"The images in {settings.data_dir} are not those of the run in {settings.job_dir} ({changed}): restore "
            f"them, or pass another --job_dir. With --weights={settings.job_dir} too, the new run starts from the weights of "
            "this one."
        )
    return settings


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
