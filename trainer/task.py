"""Trains a classifier on a folder of pictures, one sub-folder per class, and exports it ready to serve.

    python -m trainer.task --data_dir=pictures --job_dir=job
        a head on ImageNet features, computed once: minutes, on a laptop too
    python -m trainer.task --data_dir=pictures --job_dir=job --epochs=5
        then fine-tunes the whole network
    python -m trainer.task --data_dir=pictures --job_dir=job --dry_run
        shows the plan and writes nothing
    python -m trainer.task --flagfile=deploy/flags/article.flags --data_dir=pictures --job_dir=job
        the recipe of the article this project grew out of

Started again with the same flags, an interrupted job goes on where it was; a finished one says so.
Exit codes: 0 done; 2 you must change something (one line says what); 143 stopped by a signal after saving, start it
again; anything else: starting it again may help.
"""

import importlib.util
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from absl import flags, logging

from trainer import cluster, command, config, examples, metric_sink, splits, storage, task_flags
from trainer.config import Config
from trainer.errors import UserError

DEMO_PICTURES = "demo_pictures"


def define_flags() -> None:
    """The flags of this command, which --help is to show as its own."""
    task_flags.define()
    flags.adopt_module_key_flags(task_flags)


def main(arguments: list[str]) -> int:
    """Runs the job that the flags describe; returns its exit code."""
    if arguments:
        raise UserError(
            f"{arguments[0]!r} is not a flag: write --name=value; --data_dir={arguments[0]} if it is the folder."
        )
    values = command.values(config.DEFAULTS)
    return run(with_environment(Config(**values), os.environ))


def with_environment(settings: Config, environment: Mapping[str, str]) -> Config:
    """The paths that no flag gave, from what Vertex AI sets, or below job_dir. Raises UserError without a job_dir."""
    paths = {"job_dir": settings.job_dir.rstrip("/"), "model_dir": settings.model_dir.rstrip("/")}
    if not paths["job_dir"] and environment.get("AIP_CHECKPOINT_DIR"):
        paths["job_dir"] = os.path.dirname(environment["AIP_CHECKPOINT_DIR"].rstrip("/"))
    if not paths["job_dir"] and settings.data_dir:
        raise UserError("--job_dir is not set: pass the folder in which the job is to leave what it makes.")
    job_dir = paths["job_dir"] = paths["job_dir"] or "demo_job"
    paths["model_dir"] = (
        paths["model_dir"] or environment.get("AIP_MODEL_DIR", "").rstrip("/") or f"{job_dir}/saved_model"
    )
    paths["tensorboard_dir"] = (
        settings.tensorboard_dir or environment.get("AIP_TENSORBOARD_LOG_DIR", "") or f"{job_dir}/logs"
    ).rstrip("/")
    return config.replace(settings, **paths)


def run(settings: Config, *, build: Callable | None = None) -> int:
    """The job: pictures, what was there before, TensorFlow, training, export. Returns the exit code.

    `build` makes the network, by default trainer.model.build.
    """
    me = cluster.resolve(os.environ)
    _check_export_packages(settings.export_formats)
    with tempfile.TemporaryDirectory() as temporary:
        if not settings.data_dir:
            settings = _with_demo_pictures(settings, temporary)
        elif settings.data_dir.startswith("tfds:"):
            settings = _with_tfds_pictures(settings, temporary)
        _check_rights(settings, is_writing=me.is_chief and not settings.dry_run)
        folder = examples.read_folder(
            settings.data_dir,
            max_bad_fraction=settings.max_bad_fraction,
            progress=command.shows_bars(),
            read_parallelism=settings.read_parallelism,
        )
        split: dict[str, Any] = {"validation_split": settings.validation_split, "split_file": settings.split_file}
        sides = splits.choose(folder, **split)
        if settings.batch_size > len(sides.training):
            raise UserError(
                f"--batch_size is {settings.batch_size}, but there are {len(sides.training)} training pictures: "
                f"pass {len(sides.training)} or less."
            )
        steps, profiled = -(-len(sides.training) // settings.batch_size), config.profile_range(settings)
        if profiled and profiled[1] > steps:
            raise UserError(
                f"--profile_steps={settings.profile_steps}, but an epoch has {steps} steps: pass lower ones."
            )
        before = storage.read_json(f"{settings.job_dir}/config.json")
        fingerprint = examples.fingerprint(sides, folder.class_names)
        _check_same_run(settings, before, fingerprint)
        if not settings.dry_run and me.is_chief:
            _check_writable(settings.job_dir)
        logging.info("Training and validation: %s.", splits.origin(folder, **split))
        stop = StopSignal()
        command.import_tensorflow()
        os.environ["TF_CONFIG"] = cluster.tf_config(me)
        cluster.check_addresses(me, timeout_secs=300)

        from trainer import job  # imports TensorFlow

        more: dict[str, Any] = {"tell_tuner": metric_sink.choose(os.environ), "build": build or job.model.build}
        return job.run(settings, me, folder, sides, fingerprint, stop, **more)


class StopSignal:
    """Remembers that SIGTERM or SIGINT came, so that the job can save and end; the second one ends it at once."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self.listen()

    def listen(self) -> None:
        """Takes the signals; again after TensorFlow's start, whose coordination service for several hosts takes SIGTERM."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._came.is_set():
            os._exit(command.EXIT_STOPPED)
        self._came.set()
        logging.warning("%s: saving, then ending; a second signal ends at once.", signal.Signals(number).name)

    def is_set(self) -> bool:
        """Whether the job is to end."""
        return self._came.is_set()


def _with_demo_pictures(settings: Config, temporary: str) -> Config:
    from trainer import demo

    is_kept = not settings.dry_run and not storage.is_remote(settings.job_dir)
    if is_kept:
        _check_writable(settings.job_dir)
    data_dir = os.path.join(settings.job_dir if is_kept else temporary, DEMO_PICTURES)
    logging.info("No --data_dir: drawing the demo set, discs, rings and stars, in %s.", data_dir)
    demo.draw(data_dir, images_per_class=160)
    return config.replace(settings, data_dir=data_dir)


def _check_export_packages(export_formats: str) -> None:
    """Raises UserError now, and not after hours of training, if a format's packages are not installed."""
    for name in export_formats.split(","):
        missing = [package for package in config.EXPORT_PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"--export_formats={export_formats}: {name} takes packages that are not installed "
                f"({', '.join(missing)}): pip install --constraint constraints.txt '.[export]', or leave {name} out."
            )


def _with_tfds_pictures(settings: Config, temporary: str) -> Config:
    from trainer import tfds_folder

    is_kept = not settings.dry_run and not storage.is_remote(settings.job_dir)
    parent = settings.cache_dir or (settings.job_dir if is_kept else temporary)
    name = re.sub(r"[^\w.-]+", "_", settings.data_dir)
    directory = os.path.join(temporary if storage.is_remote(parent) else parent, name)
    tfds_folder.lay_out(settings.data_dir, directory)
    return config.replace(settings, data_dir=directory)


def _check_same_run(settings: Config, before: dict | None, fingerprint: str) -> None:
    """Raises UserError if job_dir holds a run that is not this one, or any run and --noresume.

    One that ended before it had anything to go on from, say for want of its weights, stands in nobody's way.
    """
    if before is None:
        return
    if not _has_progress(settings.job_dir):
        logging.info(
            "The run in %s ended before its first save: it begins anew, with the flags of now.", settings.job_dir
        )
        return
    if not settings.resume:
        raise UserError(f"{settings.job_dir} holds a run already and --noresume is set: pass another --job_dir.")
    differences = config.changes(before["flags"], settings.as_dict())
    if differences:
        raise UserError(
            f"{settings.job_dir} holds a run of other flags ({'; '.join(differences)}): pass another --job_dir, or "
            "the flags that it had."
        )
    if before["fingerprint"] != fingerprint:
        raise UserError(
            f"The pictures in {settings.data_dir} are not those that the run in {settings.job_dir} began with (see "
            "split.csv there): restore them, or pass another --job_dir."
        )


def _has_progress(job_dir: str) -> bool:
    """Whether a run has left saves (trainer.checkpoint names them by number), weights or figures there."""
    saves = [name for name in storage.list_names(f"{job_dir}/checkpoints") if name.split(".")[0].isdigit()]
    return bool(saves) or any(storage.exists(f"{job_dir}/{name}") for name in ("best.weights.h5", "metrics.json"))


def _check_rights(settings: Config, *, is_writing: bool) -> None:
    """Raises UserError, before anything else is done, if a bucket is missing or does not let itself be read or written."""
    read, written = ("data_dir", "weights", "split_file"), ("job_dir", "model_dir", "tensorboard_dir", "cache_dir")
    paths = {name: getattr(settings, name) for name in read + written}
    paths = {
        name: path
        for name, path in paths.items()
        if storage.is_remote(path) and not path.startswith(settings.job_dir + "/")
    }
    if not paths:
        return
    from trainer import bucket

    bucket.set_patience(settings.storage_timeout_secs)
    for name, path in paths.items():
        bucket.check_readable(path, flag=name)
    for name in written:
        if is_writing and name in paths:
            bucket.check_writable(paths[name], flag=name)


def _check_writable(directory: str) -> None:
    if storage.is_remote(directory):  # _check_rights has done it
        return
    try:
        storage.make_directory(directory)
        storage.write_whole(os.path.join(directory, ".writable"), b"")
        storage.remove(os.path.join(directory, ".writable"))
    except OSError as error:
        raise UserError(
            f"--job_dir={directory} cannot be written ({error.strerror}): grant it, or pass another."
        ) from None


if __name__ == "__main__":
    command.run(main, define_flags=define_flags)
