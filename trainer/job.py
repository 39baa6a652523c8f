"""The composition root: prepared data, devices and configuration -> a trained, exported and reported model.

Shapes: N training and V validation examples, F features, C classes.
"""

import contextlib
import dataclasses
import functools
import platform
import shlex
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer import cli, config, formatting
from trainer.artifacts import metrics, run_record
from trainer.artifacts.job_dir import JobDir
from trainer.config import Config
from trainer.data import groups, input_pipeline, sampler, splits
from trainer.data.dataset import Folder, Split
from trainer.data.image_source import ImageSource
from trainer.data.preprocessing import NetworkInput
from trainer.errors import UserError
from trainer.models import backbones, gradcam, networks
from trainer.models.networks import Network
from trainer.reporting import live, plan
from trainer.reporting.live import ReportWriter
from trainer.reporting.tensorboard import TensorBoard
from trainer.runtime import agreement, devices, rendezvous
from trainer.runtime.cluster import Cluster
from trainer.runtime.devices import Devices
from trainer.runtime.signals import StopSignal
from trainer.runtime.worker_watch import WorkerWatch
from trainer.serving import evaluation, exporter
from trainer.serving.exporter import FinishedRun
from trainer.storage import files, lock
from trainer.training import calibration, failures, job_stages, label_review, look_alikes, training_images
from trainer.training.cost import Cost
from trainer.training.interruption import StopReason, TrainingInterrupted
from trainer.training.progress import ProgressReporter
from trainer.training.stages import StageInputs
from trainer.training.trainer import HEAD, WHOLE_NETWORK, Callbacks, Trainer, TrainerOptions


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedJob:
    """What a command hands over: everything that is decided before TensorFlow starts.

    `report_metrics` receives each row of the history. `build_network` is models.networks.build, or a function with the
    same arguments.
    """

    settings: Config
    cluster: Cluster
    folder: Folder
    split: Split
    split_origin: str
    fingerprint: str
    profile_range: tuple[int, int] | None
    epochs_reason: str  # why --epochs of `settings` has its value
    stop: StopSignal
    report_metrics: Callable[[dict], None]
    build_network: Callable[..., Network] = networks.build
    is_split_final: bool = True  # False: it does not know yet what is similar

    @property
    def network_input(self) -> NetworkInput:
        """How images become the input of the network."""
        return backbones.input_from_flags(self.settings.as_dict())


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A prepared job with the machine that it runs on and the folder that it writes to."""

    prepared: PreparedJob
    devices: Devices
    precision: str
    xla: bool
    paths: JobDir
    resolved: dict[str, Any]  # what config.json says of the values that the flags left open
    cost: Cost
    progress: ProgressReporter
    images: ImageSource

    @property
    def settings(self) -> Config:
        """The flags."""
        return self.prepared.settings

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes."""
        return self.prepared.cluster.is_chief

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the network's outputs."""
        return self.prepared.folder.class_names

    @property
    def feature_dir(self) -> str:
        """Where the features of the frozen backbone are kept."""
        return self.settings.cache_dir or self.paths.checkpoints

    def stop_requested(self) -> StopReason:
        """Why this worker asks to stop; only the chief looks at the cost."""
        if self.prepared.stop.is_set():
            return StopReason.SIGNAL
        return StopReason.COST_LIMIT if self.cost.limit_reached() else StopReason.NONE


def run(prepared: PreparedJob) -> int:
    """Trains and exports, or prints the plan of a dry run; returns the exit code."""
    settings, cluster = prepared.settings, prepared.cluster
    watch = WorkerWatch(
        cluster,
        timeout_secs=settings.worker_timeout_secs,
        stop=prepared.stop,
        on_timeout=functools.partial(failures.leave_other_workers, code=cli.EXIT_RETRY),
        on_stop=functools.partial(failures.leave_other_workers, code=cli.EXIT_STOPPED),
    )
    rendezvous.wait_for_workers(cluster, watch)
    try:
        machine = devices.start(
            cluster,
            require_gpu=settings.require_gpu,
            waiting=watch.waiting,
            worker_timeout_secs=settings.worker_timeout_secs,
        )
    except tf.errors.DeadlineExceededError as error:
        return failures.exit_code(error, job_dir=settings.job_dir, cluster=cluster)
    prepared.stop.listen()
    precision, precision_reason = devices.choose_precision(settings.precision, machine.kind)
    trains_statistics = networks.updates_batch_statistics(settings.batch_norm, settings.weights)
    xla = devices.use_xla(settings.xla, machine, trains_statistics=bool(settings.epochs) and trains_statistics)
    resolved = {
        "precision": precision,
        "precision_reason": precision_reason,
        "xla": xla,
        "workers": cluster.workers,
        "replicas": machine.replicas,
        "devices": list(machine.names),
        "cluster": cluster.source,
        "split": prepared.split_origin,
        "epochs_reason": prepared.epochs_reason,
    }
    if settings.dry_run:
        print(plan.describe(settings, prepared.folder, prepared.split, resolved))
        return 0
    paths = JobDir(settings.job_dir)
    finished = _finished_run(prepared, paths)
    if _is_finished(finished, settings, is_chief=cluster.is_chief):
        return 0
    if cluster.is_chief:
        files.make_directory(paths.checkpoints)
    cost = Cost(settings.price_per_hour, cluster.workers, settings.max_cost if cluster.is_chief else 0.0)
    last_stage = WHOLE_NETWORK if settings.epochs else HEAD
    job = Job(
        prepared=prepared,
        devices=machine,
        precision=precision,
        xla=xla,
        paths=paths,
        resolved=resolved,
        cost=cost,
        progress=ProgressReporter(shows_bars=cli.shows_bars(), last_stage=last_stage, cost=cost),
        images=_image_source(prepared, paths),
    )
    logging.info(
        f"Worker {cluster.index + 1} of {cluster.workers} ({cluster.source}); replicas over all workers: "
        f"{machine.replicas}; devices here: {', '.join(machine.names)}; {precision}, because {precision_reason}; "
        f"XLA {'on' if xla else 'off'}."
    )
    logging.info("Fine-tuning of the whole network: %d epochs (%s).", settings.epochs, prepared.epochs_reason)
    sampler.log_imbalance(prepared.split.training.labels, prepared.folder.class_names, settings.class_weight)
    return _run_locked(job, finished)


def _finished_run(prepared: PreparedJob, paths: JobDir) -> FinishedRun:
    settings = prepared.settings
    return FinishedRun(
        paths=paths,
        data_dir=settings.data_dir,
        model_dir=settings.model_dir,
        export_formats=settings.export_formats,
        class_names=prepared.folder.class_names,
        validation=prepared.split.validation,
        test=prepared.split.test,
        network_input=prepared.network_input,
        backbone=settings.backbone,
        head=settings.head,
        with_webp="WebP" in prepared.folder.formats,
        build_network=prepared.build_network,
    )


def _image_source(prepared: PreparedJob, paths: JobDir) -> ImageSource:
    """Raises UserError, before anything is trained, if --cache does not fit."""
    settings, folder = prepared.settings, prepared.folder
    cache = input_pipeline.choose_cache(
        settings.cache,
        num_bytes=(len(prepared.split.training) + len(prepared.split.validation)) * settings.image_size**2 * 3,
        passes=settings.epochs + bool(settings.head_epochs),
        directory=settings.cache_dir or paths.checkpoints,
    )
    return ImageSource(
        settings.data_dir,
        folder,
        prepared.split,
        network_input=prepared.network_input,
        cache=cache,
        cache_dir=settings.cache_dir,
        read_parallelism=settings.read_parallelism,
        max_bad_fraction=settings.max_bad_fraction,
    )


def _is_finished(finished: FinishedRun, settings: Config, *, is_chief: bool) -> bool:
    """Whether nothing is left to do in job_dir, which is then logged."""
    values = finished.paths.read_metrics()
    if not values or values.get("epochs") != [settings.head_epochs, settings.epochs]:
        return False
    if values.get("stopped_by_cost"):
        if not settings.max_cost or values["cost"] < settings.max_cost:
            return False
        message = "The run in %s has reached its limit: it cost %.2f. To continue, raise --max_cost."
        logging.info(message, settings.job_dir, values["cost"])
    else:
        logging.info("The run in %s is finished: val_accuracy %.4f.", settings.job_dir, values["val_accuracy"])
        last_files = [finished.paths.model_card, *finished.converted_paths]
        if is_chief and not all(
            files.exists(path) for path in last_files
        ):  # killed before it wrote them, or other formats
            files.make_directory(finished.paths.checkpoints)
            with lock.hold(finished.paths.checkpoints):
                finished.paths.remove_partial_files()
                values = exporter.export_missing(finished, values)
                live.write_missing(settings.job_dir)
    _print_result(finished, values)
    return True


def _run_locked(job: Job, finished: FinishedRun) -> int:
    """Trains and exports while this job holds the lock of job_dir; returns the exit code."""
    try:
        with _lock(job):
            if job.is_chief:
                job.paths.remove_partial_files()
                _write_run_info(job)
            try:
                _train_and_export(job, finished)
            except tf.errors.OpError as error:  # TensorFlow wraps what Python raised while it was reading
                if job.images.failure:
                    raise job.images.failure from error
                raise
    except Exception as error:
        job.progress.close()
        return failures.exit_code(error, job_dir=job.settings.job_dir, cluster=job.prepared.cluster)
    return 0


def _lock(job: Job) -> contextlib.AbstractContextManager:
    if not job.is_chief:
        return contextlib.nullcontext()
    return lock.hold(job.paths.checkpoints, on_lost=lambda: failures.exit_at_once(cli.EXIT_RETRY))


def _write_run_info(job: Job) -> None:
    folder = job.prepared.folder
    job.paths.write_split(job.prepared.split, folder.class_names)
    job.paths.write_bad_files(folder.bad_files)
    job.paths.write_config(  # last: it marks a run that began
        {
            "flags": job.settings.as_dict(),
            "defaults": config.DEFAULTS,
            "resolved": job.resolved,
            "versions": {
                "tensorflow": tf.__version__,
                "keras": keras.__version__,
                "python": platform.python_version(),
            },
            "fingerprint": job.prepared.fingerprint,
        }
    )


def _train_and_export(job: Job, finished: FinishedRun) -> None:
    """Raises TrainingInterrupted after a signal. At the cost limit, it exports the best weights so far."""
    network = _build_network(job)
    if not job.prepared.is_split_final:
        try:
            job = _with_similar_together(job, network)
        except TrainingInterrupted as interruption:
            if interruption.reason != StopReason.COST_LIMIT:
                raise
            _log_cost_limit(job, has_model=False)
            return
        finished = _finished_run(job.prepared, job.paths)
    inputs = _stage_inputs(job, network)
    trainer = _make_trainer(job, network)
    _fetch_shards(job)
    writer: ReportWriter | None = None
    if job.is_chief:
        writer = ReportWriter(job.settings.job_dir, TensorBoard(job.settings.tensorboard_dir, job.settings.as_dict()))
        for row in trainer.state.history:  # of earlier starts: a tuner that lost them receives them again
            job.prepared.report_metrics(row)
        if trainer.best.epoch:  # a kill may have come after the weights or the checkpoint, and before these files
            _write_epoch(job, trainer, is_best=True)
    is_stopped_by_cost = False
    try:
        _train(job, inputs, trainer, writer)
    except TrainingInterrupted as interruption:
        if interruption.reason != StopReason.COST_LIMIT:
            raise
        is_stopped_by_cost = True
        trainer.finish_stage(trainer.state.stage)
    trainer.wait()
    job.progress.close()
    if not writer:
        return  # only the chief exports
    if is_stopped_by_cost:
        _log_cost_limit(job, has_model=bool(trainer.best.epoch))
    if trainer.best.epoch:
        job.paths.write_bad_files(job.images.bad_files.values())
        _finish(job, finished, inputs, trainer, writer, is_stopped_by_cost=is_stopped_by_cost)


def _log_cost_limit(job: Job, *, has_model: bool) -> None:
    logging.warning(
        f"Stopped: the job has cost {job.cost.total():.2f}, the limit is --max_cost={job.settings.max_cost}. "
        f"Everything is saved in {job.settings.job_dir}; the same command with a higher --max_cost resumes the run."
        + ("" if has_model else " No epoch is complete, so there is no model yet.")
    )


def _fetch_shards(job: Job) -> None:
    if job.images.num_unfetched_shards:
        with job.progress.bar("fetching shards", job.images.num_unfetched_shards) as bar:
            job.images.fetch_shards(bar.update)


def _with_similar_together(job: Job, network: Network) -> Job:
    """The job with another split, in which images that look alike are on one side. Raises as job_stages.similar_groups."""
    _check_workers_agree(job, position=None)
    _fetch_shards(job)
    found = job_stages.similar_groups(job.settings, _stage_inputs(job, network), feature_dir=job.feature_dir)
    examples, test = job.prepared.folder.examples, job.prepared.split.test
    test_paths = set(test.paths)
    examples = examples.take(np.array([path not in test_paths for path in examples.paths], bool))
    names = groups.names_of_similar(found[np.searchsorted(job.images.paths, examples.paths)], examples)
    split = splits.split_by_content(examples, job.settings.validation_split, names)._replace(test=test)
    job.images.set_split(split)
    fingerprint = splits.fingerprint(split, job.class_names)
    prepared = dataclasses.replace(job.prepared, split=split, fingerprint=fingerprint, is_split_final=True)
    job = dataclasses.replace(job, prepared=prepared)
    if job.is_chief:
        _write_run_info(job)
    return job


def _build_network(job: Job) -> Network:
    settings = job.settings
    with job.devices.strategy.scope():
        network = job.prepared.build_network(
            num_classes=len(job.class_names),
            image_size=settings.image_size,
            backbone=settings.backbone,
            weights=settings.weights,
            head=settings.head,
            precision=job.precision,
            seed=settings.seed,
            batch_norm=settings.batch_norm,
            batch_norm_momentum=settings.batch_norm_momentum,
        )
    if settings.summary and job.is_chief:
        network.model.summary(line_length=110)
    return network


def _make_trainer(job: Job, network: Network) -> Trainer:
    """A trainer at the newest checkpoint, the same one on every worker, or at the beginning."""
    settings = job.settings
    trainer = Trainer(
        network,
        paths=job.paths,
        is_chief=job.is_chief,
        validation_labels=job.prepared.split.validation.labels,
        options=TrainerOptions(
            monitor=settings.monitored_metric,
            label_smoothing=settings.label_smoothing,
            early_stopping_patience=settings.early_stopping_patience,
            checkpoint_secs=settings.checkpoint_secs,
            nan_retries=settings.nan_retries,
            steps_per_loop=settings.steps_per_loop,
        ),
        callbacks=Callbacks(
            on_steps=job.progress.on_steps,
            stop_requested=job.stop_requested,
            job_seconds=job.cost.seconds,
            barrier=functools.partial(agreement.barrier, job.devices),
        ),
    )
    if trainer.resume():
        logging.info("Resuming from the checkpoint after epoch %d.", len(trainer.state.history))
    _check_workers_agree(job, trainer.position())
    job.cost.seconds_before = trainer.state.seconds
    return trainer


def _check_workers_agree(job: Job, position: object) -> None:
    """Raises UserError on every worker if one of them has other flags, other images or another checkpoint than the chief."""
    values = job.settings.as_dict().items()
    flags = {name: value for name, value in values if name not in config.MAY_DIFFER_BETWEEN_WORKERS}
    fingerprint = job.prepared.fingerprint
    mismatched = agreement.find_mismatched_replica(repr((flags, fingerprint, job.precision, position)), job.devices)
    if mismatched is not None:
        raise UserError(
            f"Worker {mismatched // job.devices.local_replicas} has other flags, other images, another precision or "
            "another checkpoint than the chief: give all workers the same flags, the same images and one shared job_dir. "
            f"Here: worker {job.prepared.cluster.index}, images {fingerprint[:12]}, {job.precision}, at {position}, {flags}"
        )


def _train(job: Job, inputs: StageInputs, trainer: Trainer, writer: ReportWriter | None) -> None:
    """Runs the remaining stages and reports each epoch. Raises TrainingInterrupted."""

    def on_flips(flips: bool) -> None:
        job.resolved["flips"] = flips
        if job.is_chief:
            _write_run_info(job)

    remaining = job_stages.remaining_stages(
        job.settings,
        inputs,
        trainer,
        feature_dir=job.feature_dir,
        profile_range=job.prepared.profile_range,
        on_flips=on_flips,
    )
    for stage in remaining:
        for result in trainer.epochs(stage):
            job.images.check_bad_fraction()
            job.progress.on_epoch(
                result.row, result.times, is_best=result.is_best, slow_input_advice=stage.slow_input_advice
            )
            if writer:
                started = time.monotonic()
                job.prepared.report_metrics(result.row)
                _write_epoch(job, trainer, is_best=result.is_best)
                writer.after_epoch(result.row, result.times)
                result.times["saving_seconds"] += time.monotonic() - started  # in time.csv after the next epoch


def _stage_inputs(job: Job, network: Network) -> StageInputs:
    settings, split = job.settings, job.prepared.split
    return StageInputs(
        network=network,
        devices=job.devices,
        images=job.images,
        split=split,
        class_weights=sampler.class_weights(split.training.labels, len(job.class_names), settings.class_weight),
        batch_size=settings.batch_size,
        accumulate_steps=settings.accumulate_steps,
        seed=settings.seed,
        network_input=job.prepared.network_input,
        precision=job.precision,
        xla=job.xla,
        is_chief=job.is_chief,
        worker_index=job.prepared.cluster.index,
        progress=job.progress,
        stop_requested=job.stop_requested,
    )


def _write_epoch(job: Job, trainer: Trainer, *, is_best: bool) -> None:
    job.paths.write_history(trainer.state.history)
    job.paths.write_times(trainer.state.times)
    if is_best:
        best = trainer.best
        examples = job.prepared.split.validation.take(best.is_readable)
        job.paths.write_predictions(examples, best.probabilities[best.is_readable], job.class_names)


def _finish(
    job: Job,
    finished: FinishedRun,
    inputs: StageInputs,
    trainer: Trainer,
    writer: ReportWriter,
    *,
    is_stopped_by_cost: bool,
) -> None:
    """Exports the best weights and writes the last files of a run."""
    features = job_stages.read_features(job.settings, inputs, feature_dir=job.feature_dir)
    alike = look_alikes.review(inputs, features, trainer.best, job.class_names)
    reviewed = label_review.review(job.settings, inputs, features, trainer.best)
    job.paths.write_label_issues(*reviewed.listed(), job.class_names)
    examples = job.prepared.split.validation.take(trainer.best.is_readable)
    probabilities = trainer.best.probabilities[trainer.best.is_readable]
    calibrated = calibration.calibrate(probabilities, examples.labels)
    best = exporter.rebuild_best(finished, calibrated.temperature)
    is_frozen = trainer.state.history[trainer.best.epoch - 1]["stage"] == HEAD  # else the features are of other weights
    known = training_images.fit_novelty(best, inputs, features if is_frozen else None, data_dir=job.settings.data_dir)
    differences = exporter.export_all(finished, best, trainer.best.is_readable, known)
    test, unreadable = evaluation.evaluate_test_set(finished, batch_size=job.settings.batch_size)
    if unreadable:
        job.images.bad_files |= {bad.path: bad for bad in unreadable}
        job.paths.write_bad_files(job.images.bad_files.values())
    values = {
        **_metrics(job, trainer),
        **reviewed.metrics(),
        **alike,
        "export_differences": differences,
        "calibration": calibrated.as_json(),
    }
    if known:
        values["novelty"] = {"threshold": known.threshold, "refused_validation": known.refused_validation}
    if test:
        values["test"] = test
    probabilities = calibration.apply(probabilities, calibrated.temperature)
    job.paths.write_predictions(examples, probabilities, job.class_names)
    if is_stopped_by_cost:
        values["stopped_by_cost"] = True
    heatmaps = gradcam.of_files(
        best,
        finished.data_dir,
        run_record.read(finished.paths.root).shown_paths,
        network_input=finished.network_input,
    )
    job.paths.write_heatmaps(trainer.best.epoch, heatmaps)
    job.paths.write_times(trainer.state.times)
    job.paths.write_metrics(values)
    writer.finish()
    _print_result(finished, values)


def _metrics(job: Job, trainer: Trainer) -> dict[str, Any]:
    """What metrics.json says of the best weights and of the run."""
    settings, split, best = job.settings, job.prepared.split, trainer.best
    values = {
        **metrics.validation_metrics(
            split.validation.labels[best.is_readable], best.probabilities[best.is_readable], job.class_names
        ),
        "val_loss": best.val_loss,
        "best_epoch": best.epoch,
        "epochs": [settings.head_epochs, settings.epochs],
        "train_images": len(split.training),
        "validation_images": len(split.validation),
        "bad_images": len(job.images.bad_files),
        "seconds": round(job.cost.seconds(), 1),
        "images_per_second": trainer.state.history[-1]["images_per_second"],
        "replicas": job.devices.replicas,
        "workers": job.prepared.cluster.workers,
        "precision": job.precision,
        "storage_retries": files.retry_count(),
    }
    if settings.price_per_hour:
        values["cost"] = round(job.cost.total(), 4)
    return values


def _print_result(finished: FinishedRun, values: dict[str, Any]) -> None:
    name = finished.validation.paths[0]
    example = name if files.is_remote(name) else files.join(finished.data_dir, name)
    test = "test accuracy {accuracy:.4f} ({low:.4f} to {high:.4f} with 95 % confidence, {images} images)"
    arguments = shlex.join([f"--model_dir={finished.model_dir}", example])
    lines = [
        *([test.format(**values["test"])] if "test" in values else []),
        f"val_accuracy {values['val_accuracy']:.4f} (epoch {values['best_epoch']}), "
        f"{formatting.duration(values['seconds'])}",
        f"report: {finished.paths.report_page}",
        f"model:  {finished.model_dir}",
        *(f"        {path}" for path in finished.converted_paths),
        f"try it: {cli.command('predict')} {arguments}",
    ]
    if estimate := values.get("cross_validated"):
        low, high = estimate["low"], estimate["high"]
        lines.insert(1, f"cross-validated accuracy {estimate['accuracy']:.4f} ({low:.4f} to {high:.4f} at 95 %)")
    print("\n".join(lines), flush=True)
