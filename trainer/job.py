"""The composition root: prepared data, devices and configuration -> a trained, exported and reported model.

Shapes: N training and V validation examples, F features, C classes.
"""

import contextlib
import dataclasses
import functools
import time

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import cli, config, job_results
from trainer.artifacts.job_dir import JobDir
from trainer.data import groups, input_pipeline, sampler, splits
from trainer.data.image_source import ImageSource
from trainer.errors import UserError
from trainer.models import networks
from trainer.models.networks import Network
from trainer.prepared_job import Job, PreparedJob
from trainer.reporting import plan
from trainer.reporting.live import ReportWriter
from trainer.reporting.tensorboard import TensorBoard
from trainer.runtime import agreement, devices, rendezvous
from trainer.runtime.worker_watch import WorkerWatch
from trainer.serving.exporter import FinishedRun
from trainer.storage import files, lock
from trainer.training import failures, job_stages
from trainer.training.cost import Cost
from trainer.training.interruption import StopReason, TrainingInterrupted
from trainer.training.progress import ProgressReporter
from trainer.training.stages import StageInputs
from trainer.training.trainer import HEAD, WHOLE_NETWORK, Callbacks, Trainer, TrainerOptions


def run(prepared: PreparedJob) -> str:
    """Trains and exports; returns the result, or the plan of a dry run, as lines for a person.

    Raises what failures.error_to_raise returns: TrainingInterrupted after a request to stop, when everything is saved.
    """
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
        raise failures.error_to_raise(error, job_dir=settings.job_dir, cluster=cluster)  # noqa: B904
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
        return plan.describe(settings, prepared.folder, prepared.split, resolved)
    paths = JobDir(settings.job_dir)
    finished = job_results.finished_run(prepared, paths)
    if result := job_results.finished_result(finished, settings, is_chief=cluster.is_chief):
        return result
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
        progress=ProgressReporter(
            shows_bars=cli.shows_bars(), last_stage=last_stage, cost=cost, started_at=prepared.started_at
        ),
        images=_image_source(prepared, paths),
    )
    for line in plan.summary(settings, prepared.split, resolved, worker=cluster.index):
        logging.info("%s", line)
    sampler.log_imbalance(prepared.split.training.labels, prepared.folder.class_names, settings.class_weight)
    return _run_locked(job, finished)


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


def _run_locked(job: Job, finished: FinishedRun) -> str:
    """Trains and exports while this job holds the lock of job_dir; returns the result as lines for a person."""
    try:
        with _lock(job):
            if job.is_chief:
                job.paths.remove_partial_files()
                job_results.write_run_info(job)
            try:
                return _train_and_export(job, finished)
            except tf.errors.OpError as error:  # TensorFlow wraps what Python raised while it was reading
                if job.images.failure:
                    raise job.images.failure from error
                raise
    except Exception as error:
        job.progress.close()
        cluster = job.prepared.cluster
        raise failures.error_to_raise(error, job_dir=job.settings.job_dir, cluster=cluster)  # noqa: B904


def _lock(job: Job) -> contextlib.AbstractContextManager:
    if not job.is_chief:
        return contextlib.nullcontext()
    return lock.hold(job.paths.checkpoints, on_lost=job.prepared.on_lock_lost)


def _train_and_export(job: Job, finished: FinishedRun) -> str:
    """Returns the result as lines for a person. At the cost limit, it exports the best weights so far.

    Raises TrainingInterrupted after a signal.
    """
    with job.progress.phase("start"):
        network = _build_network(job)
    if not job.prepared.is_split_final:
        try:
            job = _with_similar_together(job, network)
        except TrainingInterrupted as interruption:
            if interruption.reason != StopReason.COST_LIMIT:
                raise
            job_results.log_cost_limit(job, has_model=False)
            return ""
        finished = job_results.finished_run(job.prepared, job.paths)
    inputs = _stage_inputs(job, network)
    trainer = _make_trainer(job, network)
    _fetch_shards(job)
    writer: ReportWriter | None = None
    if job.is_chief:
        writer = ReportWriter(job.settings.job_dir, TensorBoard(job.settings.tensorboard_dir, job.settings.as_dict()))
        for row in trainer.state.history:  # of earlier starts: a tuner that lost them receives them again
            job.prepared.report_metrics(row)
        if trainer.best.epoch:  # a kill may have come after the weights or the checkpoint, and before these files
            job_results.write_epoch(job, trainer, is_best=True)
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
        return ""  # only the chief exports
    if is_stopped_by_cost:
        job_results.log_cost_limit(job, has_model=bool(trainer.best.epoch))
    if not trainer.best.epoch:
        return ""
    job.paths.write_bad_files(job.images.bad_files.values())
    return job_results.finish(job, finished, inputs, trainer, writer, is_stopped_by_cost=is_stopped_by_cost)


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
        job_results.write_run_info(job)
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
            on_stage=job.progress.on_stage,
            on_validation=job.progress.on_validation,
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
            job_results.write_run_info(job)

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
                result.row,
                result.times,
                is_best=result.is_best,
                num_validated=result.num_validated,
                slow_input_advice=stage.slow_input_advice,
            )
            if writer:
                started = time.monotonic()
                job.prepared.report_metrics(result.row)
                job_results.write_epoch(job, trainer, is_best=result.is_best)
                writer.after_epoch(result.row, result.times)
                job.prepared.on_epoch(result.row)
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
