"""The job from devices to the exported model: what `trainer.task` does once the pictures are known.

Shapes: N training and V validation examples, F features, C classes.
"""

import contextlib
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from trainer import (
    command,
    data,
    deliver,
    devices,
    gradcam,
    job_stages,
    lease,
    model,
    plan,
    record,
    scoring,
    splits,
    stages,
    storage,
    train,
    wording,
)
from trainer.cluster import Cluster
from trainer.config import DEFAULTS, MAY_DIFFER_BETWEEN_WORKERS, Config
from trainer.cost import Cost
from trainer.display import Display, draw_missing
from trainer.errors import UserError
from trainer.examples import BadFile, Folder, Split
from trainer.job_dir import JobDir
from trainer.job_stages import Job
from trainer.model import Network
from trainer.pictures import Pictures
from trainer.stages import Run, Stage
from trainer.tensorboard import TensorBoard
from trainer.terminal import Terminal

WORTH_A_HINT = 0.1  # of the steps' time spent waiting for pictures
SECONDS_WORTH_A_HINT = 10  # of an epoch; in less, the start of the input is most of it


def run(
    settings: Config,
    me: Cluster,
    folder: Folder,
    sides: Split,
    fingerprint: str,
    stop: Any,
    *,
    tell_tuner: Callable[[dict], None],
    build: Callable[..., Network],
) -> int:
    """Trains and exports; returns the exit code. `stop.is_set()` tells that a signal asked for the end.

    `tell_tuner` gets each row of the history. `build` makes the network: trainer.model.build, or what takes the same
    arguments.
    """
    machine = devices.start(me, require_gpu=settings.require_gpu)
    stop.listen()
    precision, reason = devices.precision(settings.precision, machine.kind)
    trains_statistics = model.trains_statistics(settings.batch_norm, settings.weights)
    xla = devices.use_xla(settings.xla, machine, trains_statistics=bool(settings.epochs) and trains_statistics)
    resolved = {
        **{"precision": precision, "precision_reason": reason, "xla": xla, "workers": me.workers},
        **{"replicas": machine.replicas, "devices": list(machine.names), "cluster": me.source},
        "split": splits.origin(folder, validation_split=settings.validation_split, split_file=settings.split_file),
    }
    if settings.dry_run:
        print(plan.describe(settings, folder, sides, resolved))
        return 0
    cost = Cost(settings.price_per_hour, me.workers, settings.max_cost if me.is_chief else 0.0)
    paths = JobDir(settings.job_dir)
    if _is_finished(deliver.Outcome(settings, folder, sides.validation, paths, build), is_chief=me.is_chief):
        return 0
    if me.is_chief:
        storage.make_directory(paths.checkpoints)
    job = Job(
        *(settings, me, folder, sides, machine, precision, xla, paths),
        Terminal(command.shows_bars(), last_stage="all" if settings.epochs else "head", cost=cost),
        *(cost, stop, tell_tuner, build),
        _pictures(settings, folder, sides, paths),
    )
    logging.info(
        "Worker %d of %d (%s), %d replicas in all, here on %s; %s, since %s; XLA %s.",
        *(me.index + 1, me.workers, me.source, machine.replicas, ", ".join(machine.names)),
        *(precision, reason, "on" if xla else "off"),
    )
    return _run_under_lease(job, resolved, fingerprint)


def _run_under_lease(job: Job, resolved: dict, fingerprint: str) -> int:
    """Trains and exports while no other job may write; returns the exit code of how that ended."""
    settings, me = job.settings, job.me
    try:
        with _lease(job):
            if me.is_chief:
                for directory in (settings.job_dir, job.paths.checkpoints, f"{settings.job_dir}/report"):
                    storage.remove_leftovers(directory)
                _write_what_is_known(job, resolved, fingerprint)
            try:
                _train_and_export(job, fingerprint)
            except tf.errors.OpError as error:  # TensorFlow wraps what Python raised while it was reading
                if job.pictures.failure:
                    raise job.pictures.failure from error
                raise
    except train.Stopped:
        job.terminal.close()
        logging.warning("Stopped; all is saved in %s. The same command goes on from here.", settings.job_dir)
        return command.EXIT_STOPPED
    except TimeoutError as error:  # of a bucket
        logging.error("%s: %s. All that was saved is intact in %s.", error.filename, error.strerror, settings.job_dir)
        return command.EXIT_RETRY
    except OSError as error:
        raise UserError(
            f"{error.filename or settings.job_dir} cannot be written or read ({error.strerror or error}): mend that and "
            f"start the same command again; it goes on from the last complete save in {settings.job_dir}."
        ) from error
    except LOST_WORKER as error:
        if me.workers == 1:
            raise
        logging.error("Another worker ended or cannot be reached; start all workers again. (%s)", first_line(error))
        logging.flush()
        os._exit(command.EXIT_RETRY)  # an orderly end would wait for the worker that is gone
    return 0


def _is_finished(outcome: deliver.Outcome, *, is_chief: bool) -> bool:
    """Whether nothing is left to do in job_dir, which is then said."""
    settings, metrics = outcome.settings, storage.read_json(outcome.paths.metrics)
    if not metrics or metrics["epochs"] != [settings.head_epochs, settings.epochs]:
        return False
    if metrics.get("stopped_by_cost"):
        if not settings.max_cost or metrics["cost"] < settings.max_cost:
            return False
        logging.info(
            "The run in %s has cost %.2f, which is all it may: raise --max_cost.", settings.job_dir, metrics["cost"]
        )
    else:
        logging.info("The run in %s is finished: val_accuracy %.4f.", settings.job_dir, metrics["val_accuracy"])
        if is_chief:
            metrics = deliver.what_is_missing(outcome, metrics)
            draw_missing(settings.job_dir)
    _say_what_is_there(outcome, metrics)
    return True


def _pictures(settings: Config, folder: Folder, sides: Split, paths: JobDir) -> Pictures:
    """Raises UserError, before anything is trained, if --cache does not fit."""
    cache = data.choose_cache(
        settings.cache,
        num_bytes=len(folder.examples) * settings.image_size**2 * 3,
        passes=settings.epochs + bool(settings.head_epochs),
        directory=settings.cache_dir or paths.checkpoints,
    )
    names = ("image_size", "cache_dir", "read_parallelism")
    options = {name: getattr(settings, name) for name in names}
    return Pictures(settings.data_dir, folder, sides, cache=cache, **options)


def _lease(job: Job) -> contextlib.AbstractContextManager:
    def end_at_once() -> None:
        logging.flush()
        os._exit(command.EXIT_RETRY)  # two jobs must not write

    return lease.hold(job.paths.checkpoints, on_lost=end_at_once) if job.me.is_chief else contextlib.nullcontext()


# What a collective operation raises when a worker at its other end is gone.
LOST_WORKER = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError, tf.errors.CancelledError,
               tf.errors.DeadlineExceededError, tf.errors.FailedPreconditionError)  # fmt: skip


def first_line(error: tf.errors.OpError) -> str:
    """What TensorFlow said, without its stack."""
    return error.message.splitlines()[0][:300]


def _write_what_is_known(job: Job, resolved: dict, fingerprint: str) -> None:
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "python": platform.python_version()}
    known = {"flags": job.settings.as_dict(), "defaults": DEFAULTS, "resolved": resolved, "versions": versions}
    job.paths.write_split(job.sides, job.folder.class_names)
    job.paths.write_bad_files(list(job.folder.bad_files))
    storage.write_json(job.paths.config, {**known, "fingerprint": fingerprint})  # last: it marks a run that began


def _check_workers(job: Job, training: Run, fingerprint: str) -> None:
    """Raises UserError on every worker if one of them has other flags, other pictures or another save than the chief."""
    values = job.settings.as_dict().items()
    flags = {name: value for name, value in values if name not in MAY_DIFFER_BETWEEN_WORKERS}
    stranger = train.find_stranger(repr((flags, fingerprint, job.precision, training.position())), job.devices)
    if stranger is not None:
        raise UserError(
            f"Worker {stranger // job.devices.local_replicas} has other flags, other pictures, another precision or sees "
            f"another save than the chief: give all workers the same flags, the same pictures and one shared job_dir. "
            f"Here: worker {job.me.index}, pictures {fingerprint[:12]}, {job.precision}, at {training.position()}, {flags}"
        )


def _train_and_export(job: Job, fingerprint: str) -> None:
    """Raises train.Stopped if a signal came; a limit of cost that was reached ends it with what there is."""
    network = _build(job)
    bad_files = {bad.path: bad for bad in job.folder.bad_files}
    job.pictures.on_bad = lambda path: job_stages.note_unreadable(job, bad_files, [path])
    training = _resume(job, network, fingerprint)
    if job.pictures.num_shards:
        with job.terminal.pass_over("fetching shards", job.pictures.num_shards) as bar:
            job.pictures.stage(bar.update)
    display: Display | None = None
    if job.me.is_chief:
        display = Display(job.settings.job_dir, TensorBoard(job.settings.tensorboard_dir, job.settings.as_dict()))
        for row in training.progress.history:  # of earlier starts: a tuner that lost them gets them again
            job.tell_tuner(row)
    is_stopped_by_cost = False
    try:
        _train(job, network, training, bad_files, display)
    except train.Stopped as stopped:
        if stopped.by_signal:
            raise
        is_stopped_by_cost = True
        training.end(training.progress.stage)
    training.wait()
    job.terminal.close()
    if not display:
        return  # the chief writes what there is
    if is_stopped_by_cost:
        logging.warning(
            "Stopped: the job has cost %.2f, as --max_cost=%s says. All is saved in %s; the same command with a higher "
            "--max_cost goes on from here.%s",
            *(job.cost.after(), job.settings.max_cost, job.settings.job_dir),
            "" if training.best.epoch else " No epoch is complete, so there is no model yet.",
        )
    if training.best.epoch:
        job.paths.write_bad_files(list(bad_files.values()))
        _finish(job, training, display, len(bad_files), is_stopped_by_cost=is_stopped_by_cost)


def _build(job: Job) -> Network:
    settings = job.settings
    with job.devices.strategy.scope():
        network = job.build(
            num_classes=len(job.folder.class_names),
            image_size=settings.image_size,
            weights=settings.weights,
            head=settings.head,
            precision=job.precision,
            seed=settings.seed,
            batch_norm=settings.batch_norm,
        )
    if settings.summary and job.me.is_chief:
        network.model.summary(line_length=110)
    return network


def _resume(job: Job, network: Network, fingerprint: str) -> Run:
    """The run where its newest save left it, on every worker the same one; or at its beginning."""
    settings = job.settings
    training = Run(
        network.model,
        network.head,
        paths=job.paths,
        is_chief=job.me.is_chief,
        validation_labels=job.sides.validation.labels,
        label_smoothing=settings.label_smoothing,
        early_stopping_patience=settings.early_stopping_patience,
        checkpoint_secs=settings.checkpoint_secs,
        nan_retries=settings.nan_retries,
        steps_per_loop=settings.steps_per_loop,
        watcher=stages.Watcher(job.terminal.on_round, job.wish_to_stop, job.cost.seconds),
    )
    if training.resume():
        logging.info("Going on from the save after epoch %d.", len(training.progress.history))
    _check_workers(job, training, fingerprint)
    job.cost.seconds_before = training.progress.seconds
    return training


def _train(job: Job, network: Network, training: Run, bad_files: dict[str, BadFile], display: Display | None) -> None:
    """Runs the stages that remain, and shows each epoch. Raises Stopped."""
    hint = ""
    for stage in job_stages.remaining(job, network, training, bad_files):
        for result in training.epochs(stage):
            job_stages.check_bad_files(job, bad_files)
            job.terminal.on_epoch(result.row, result.times, is_best=result.is_best)
            hint = _hint_at_input(stage, result, hint)
            if display:
                writing = time.monotonic()
                job.tell_tuner(result.row)
                _write_epoch(job, training, is_best=result.is_best)
                display.after_epoch(result.row, result.times)
                result.times["saving_seconds"] += time.monotonic() - writing  # told by the next writing of time.csv


def _finish(job: Job, training: Run, display: Display, num_bad: int, *, is_stopped_by_cost: bool) -> None:
    """Exports the best weights and writes what a finished run leaves."""
    settings = job.settings
    outcome = deliver.Outcome(settings, job.folder, job.sides.validation, job.paths, job.build)
    best = deliver.best_network(outcome)
    differences = deliver.everything(outcome, best, training.best.is_readable)
    metrics = {**_metrics(job, training, num_bad), "export_differences": differences}
    if is_stopped_by_cost:
        metrics["stopped_by_cost"] = True
    shown = record.read(settings.job_dir).shown_paths
    heatmaps = gradcam.of_files(
        best, settings.data_dir, shown, image_size=settings.image_size, preprocessing=settings.preprocessing
    )
    job.paths.write_heatmaps(training.best.epoch, heatmaps)
    job.paths.write_times(training.progress.times)
    storage.write_json(job.paths.metrics, metrics)
    display.finish()
    _say_what_is_there(outcome, metrics)


def _hint_at_input(stage: Stage, result: stages.EpochResult, said: str) -> str:
    """Says once, of a stage over pictures, that the device waits for them, and what to try; returns what was said."""
    share = result.times["input_wait_seconds"] / max(result.row["seconds"], 1e-9)
    is_short = result.row["seconds"] < SECONDS_WORTH_A_HINT
    if said or is_short or not stage.if_input_is_slow or share < WORTH_A_HINT:
        return said
    hint = f"Input wait {100 * share:.0f} %: the device waits for pictures. {stage.if_input_is_slow}"
    logging.info(hint)
    return hint


def _write_epoch(job: Job, training: Run, *, is_best: bool) -> None:
    job.paths.write_history(training.progress.history)
    job.paths.write_times(training.progress.times)
    if is_best:
        shown, best = job.sides.validation, training.best
        probabilities = best.probabilities[best.is_readable]
        job.paths.write_predictions(shown.take(best.is_readable), probabilities, job.folder.class_names)


def _metrics(job: Job, training: Run, num_bad: int) -> dict:
    settings, best, history = job.settings, training.best, training.progress.history
    labels = job.sides.validation.labels[best.is_readable]
    predicted = best.probabilities[best.is_readable].argmax(axis=1)
    scores = scoring.classification_metrics(labels, predicted, len(job.folder.class_names))
    names = job.folder.class_names
    metrics = {
        "val_accuracy": best.val_accuracy,
        "val_loss": best.val_loss,
        "balanced_accuracy": scores.balanced_accuracy,
        "best_epoch": best.epoch,
        "epochs": [settings.head_epochs, settings.epochs],
        "train_images": len(job.sides.training),
        "validation_images": len(job.sides.validation),
        "bad_images": num_bad,
        "seconds": round(job.cost.seconds(), 1),
        "images_per_second": history[-1]["images_per_second"],
        "replicas": job.devices.replicas,
        "workers": job.me.workers,
        "precision": job.precision,
        "storage_retries": storage.retries(),
        "per_class": dict(zip(names, scores.per_class, strict=True)),
    }
    if settings.price_per_hour:
        metrics["cost"] = round(job.cost.after(), 4)
    return metrics


def _say_what_is_there(outcome: deliver.Outcome, metrics: dict) -> None:
    settings = outcome.settings
    example = f"{settings.data_dir}/{outcome.validation.paths[0]}"
    lines = [
        f"val_accuracy {metrics['val_accuracy']:.4f} (epoch {metrics['best_epoch']}), {wording.duration(metrics['seconds'])}",
        f"report: {settings.job_dir}/report/index.html",
        f"model:  {settings.model_dir}",
        *(f"        {path}" for path in deliver.further_paths(outcome)),
        "try it: " + plan.shell_line("python", "-m", "trainer.predict", f"--model_dir={settings.model_dir}", example),
    ]
    print("\n".join(lines), flush=True)
