"""What a job writes: the files of a run that begins, those of each epoch, and the exported model with the last files."""

import platform
import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from trainer import cli, config, formatting
from trainer.artifacts import metrics, run_record
from trainer.artifacts.job_dir import JobDir
from trainer.config import Config
from trainer.errors import UserError
from trainer.models import gradcam
from trainer.models.networks import Network
from trainer.prepared_job import Job, PreparedJob
from trainer.reporting import live
from trainer.reporting.live import ReportWriter
from trainer.serving import evaluation, exporter
from trainer.serving.exporter import FinishedRun
from trainer.storage import files, lock
from trainer.training import calibration, job_stages, label_review, look_alikes, training_images
from trainer.training.inference import ModelOutputs
from trainer.training.stages import StageInputs
from trainer.training.trainer import HEAD, Trainer


def finished_run(prepared: PreparedJob, paths: JobDir) -> FinishedRun:
    """What the export needs to know of a run."""
    settings = prepared.settings
    return FinishedRun(
        paths=paths,
        data_dir=settings.data_dir,
        model_dir=settings.model_dir,
        export_formats=settings.export_formats,
        serving_precision=settings.serving_precision,
        class_names=prepared.folder.class_names,
        training=prepared.split.training,
        validation=prepared.split.validation,
        test=prepared.split.test,
        network_input=prepared.network_input,
        backbone=settings.backbone,
        head=settings.head,
        with_webp="WebP" in prepared.folder.formats,
        build_network=prepared.build_network,
    )


def finished_result(finished: FinishedRun, settings: Config, *, is_chief: bool) -> str:
    """The result as lines for a person if nothing is left to do in job_dir, which is then logged; else an empty text."""
    values = finished.paths.read_metrics()
    if not values or values.get("epochs") != [settings.head_epochs, settings.epochs]:
        return ""
    if values.get("stopped_by_cost"):
        if not settings.max_cost or values["cost"] < settings.max_cost:
            return ""
        message = "The run in %s has reached its limit: it cost %.2f. To continue, raise --max_cost."
        logging.info(message, settings.job_dir, values["cost"])
    else:
        logging.info("The run in %s is finished.", settings.job_dir)
        last_files = [finished.paths.model_card, *finished.converted_paths]
        if is_chief and not all(
            files.exists(path) for path in last_files
        ):  # killed before it wrote them, or other formats
            files.make_directory(finished.paths.checkpoints)
            with lock.hold(finished.paths.checkpoints):
                finished.paths.remove_partial_files()
                exported = exporter.export_missing(finished, values)
                if exported == values:
                    live.write_missing(settings.job_dir)
                else:  # the model card names the exports
                    live.write_all(settings.job_dir)
                values = exported
    return _describe_result(finished, values)


def write_run_info(job: Job) -> None:
    """Writes split.csv, labels.txt, bad_files.csv and config.json."""
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


def write_epoch(job: Job, trainer: Trainer, *, is_best: bool) -> None:
    """Writes history.csv and time.csv, and after the best epoch so far predictions.csv."""
    job.paths.write_history(trainer.state.history)
    job.paths.write_times(trainer.state.times)
    if is_best:
        best = trainer.best
        examples = job.prepared.split.validation.take(best.is_readable)
        job.paths.write_predictions(examples, best.probabilities[best.is_readable], job.class_names)


def finish(
    job: Job,
    finished: FinishedRun,
    inputs: StageInputs,
    trainer: Trainer,
    writer: ReportWriter,
    *,
    is_stopped_by_cost: bool,
) -> str:
    """Exports the best weights and writes the last files of a run; returns the result as lines for a person.

    Raises UserError at its end if a format is refused.
    """
    phase = job.progress.phase
    with phase("review", "Reviewing the labels and looking for images that are alike."):
        features = job_stages.read_features(job.settings, inputs, feature_dir=job.feature_dir)
        values = {**_metrics(job, trainer), **_review_images(job, inputs, features, trainer)}
    with phase("export", "Exporting the best weights."):
        best, exported = _export(job, finished, inputs, features, trainer)
    values |= exported
    with phase("test", f"Classifying {len(finished.test)} test images." if len(finished.test) else ""):
        test, unreadable = evaluation.evaluate_test_set(finished, batch_size=job.settings.batch_size)
    if unreadable:
        job.images.bad_files |= {bad.path: bad for bad in unreadable}
        job.paths.write_bad_files(job.images.bad_files.values())
    values["bad_images"] = len(job.images.bad_files)
    if test:
        values["test"] = test
    if is_stopped_by_cost:
        values["stopped_by_cost"] = True
    with phase("heatmaps", "Computing the heat maps of the report."):
        heatmaps = gradcam.of_files(
            best,
            finished.data_dir,
            run_record.read(finished.paths.root).shown_paths,
            network_input=finished.network_input,
        )
    job.paths.write_heatmaps(trainer.best.epoch, heatmaps)
    job.paths.write_times(trainer.state.times)
    values["seconds"] = round(job.cost.seconds(), 1)
    if job.settings.price_per_hour:
        values["cost"] = round(job.cost.total(), 4)
    job.paths.write_metrics(values)
    refusal = None
    try:
        values = exporter.export_missing(finished, values, best)
    except UserError as error:
        refusal = error
    with phase("report", "Writing the report."):
        writer.finish()
    result = _describe_result(finished, values, job.progress.phase_seconds)
    if refusal:
        logging.info("%s", result)
        raise refusal
    return result


def _review_images(job: Job, inputs: StageInputs, features: ModelOutputs | None, trainer: Trainer) -> dict[str, Any]:
    """Writes label_issues.csv; returns what metrics.json says of labels, look-alikes and the cross-validated accuracy."""
    alike = look_alikes.review(inputs, features, trainer.best, job.class_names)
    reviewed = label_review.review(job.settings, inputs, features, trainer.best)
    job.paths.write_label_issues(*reviewed.listed(), job.class_names)
    return {**reviewed.metrics(), **alike}


def _export(
    job: Job, finished: FinishedRun, inputs: StageInputs, features: ModelOutputs | None, trainer: Trainer
) -> tuple[Network, dict[str, Any]]:
    """Exports the calibrated best network, and writes predictions.csv; returns it and what metrics.json says of it."""
    examples = job.prepared.split.validation.take(trainer.best.is_readable)
    probabilities = trainer.best.probabilities[trainer.best.is_readable]
    calibrated = calibration.calibrate(probabilities, examples.labels)
    best = exporter.rebuild_best(finished, calibrated.temperature)
    is_frozen = trainer.state.history[trainer.best.epoch - 1]["stage"] == HEAD  # else the features are of other weights
    known = training_images.fit_novelty(best, inputs, features if is_frozen else None, data_dir=job.settings.data_dir)
    logging.info("Writing the SavedModel, and comparing it with the network in memory.")
    exports = exporter.export_all(finished, best, trainer.best, known)
    probabilities = calibration.apply(probabilities, calibrated.temperature)
    job.paths.write_predictions(examples, probabilities, job.class_names)
    values: dict[str, Any] = {"exports": exports, "calibration": calibrated.as_json()}
    if known:
        values["novelty"] = {"threshold": known.threshold, "refused_validation": known.refused_validation}
    return best, values


def _metrics(job: Job, trainer: Trainer) -> dict[str, Any]:
    """What metrics.json says of the best weights and of the run."""
    settings, split, best = job.settings, job.prepared.split, trainer.best
    return {
        **metrics.validation_metrics(
            split.validation.labels[best.is_readable], best.probabilities[best.is_readable], job.class_names
        ),
        "val_loss": best.val_loss,
        "best_epoch": best.epoch,
        "epochs": [settings.head_epochs, settings.epochs],
        "train_images": len(split.training),
        "validation_images": len(split.validation),
        "images_per_second": trainer.state.history[-1]["images_per_second"],
        "replicas": job.devices.replicas,
        "workers": job.prepared.cluster.workers,
        "precision": job.precision,
        "storage_retries": files.retry_count(),
    }


def _describe_result(
    finished: FinishedRun, values: dict[str, Any], phase_seconds: Mapping[str, float] = MappingProxyType({})
) -> str:
    name = finished.validation.paths[0]
    example = name if files.is_remote(name) else files.join(finished.data_dir, name)
    model = shlex.quote(f"--model_dir={finished.model_dir}")
    phases = [f"{name} {formatting.duration(seconds)}" for name, seconds in phase_seconds.items() if seconds >= 1]
    lines = [
        *_describe_accuracies(values),
        f"time:   {formatting.duration(values['seconds'])}{', of which ' if phases else ''}{', '.join(phases)}",
        f"report: {finished.paths.report_page}",
        f"model:  {finished.model_dir}",
        *(f"        {path}" for path in finished.converted_paths if files.exists(path)),
        f"try it: {cli.command('predict')} {model} {shlex.quote(example)}",
        f"test:   {cli.command('evaluate')} {model} --data_dir=NEW_IMAGES --report_dir=evaluation",
        f"serve:  {cli.command('serve')} {model}",
    ]
    return "\n".join(lines)


def _describe_accuracies(values: dict[str, Any]) -> list[str]:
    """A line for each accuracy in metrics.json, the least optimistic first."""
    validated = sum(row["support"] for row in values["per_class"].values())
    counts = {f"validation accuracy, epoch {values['best_epoch']}": (values["val_accuracy"] * validated, validated)}
    for name in ("cross_validated", "test"):
        if estimate := values.get(name):
            counts = {f"{name.replace('_', '-')} accuracy": (estimate["correct"], estimate["images"]), **counts}
    return [f"{name}: {metrics.describe_accuracy(round(correct), total)}" for name, (correct, total) in counts.items()]


def log_cost_limit(job: Job, *, has_model: bool) -> None:
    """Says that the job ends at --max_cost, and how to resume it."""
    logging.warning(
        f"Stopped: the job has cost {job.cost.total():.2f}, the limit is --max_cost={job.settings.max_cost}. "
        f"Everything is saved in {job.settings.job_dir}; the same command with a higher --max_cost resumes the run."
        + ("" if has_model else " No epoch is complete, so there is no model yet.")
    )
