"""What is settled of a job before it trains, and the stages made of that: the head over features, the whole network.

Shapes: N training and V validation examples, F features, C classes.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import config, data, examples, features, model, storage, train
from trainer.cluster import Cluster
from trainer.config import Config
from trainer.cost import Cost
from trainer.devices import Devices
from trainer.examples import BadFile, Folder, Split
from trainer.job_dir import JobDir
from trainer.model import Network
from trainer.pictures import Pictures
from trainer.stages import Run, Stage
from trainer.terminal import Terminal

INFERENCE_BATCH = 64  # pictures per replica where nothing is learned


class Job(NamedTuple):
    """What is settled before training and stays as it is."""

    settings: Config
    me: Cluster
    folder: Folder
    sides: Split
    devices: Devices
    precision: str
    xla: bool
    paths: JobDir
    terminal: Terminal
    cost: Cost
    stop: threading.Event  # set when a signal asks for the end
    tell_tuner: Callable[[dict], None]
    build: Callable[..., Network]
    pictures: Pictures

    def wish_to_stop(self) -> float:
        """0, or why this worker wants to end; only the chief looks at the cost."""
        return train.BY_SIGNAL if self.stop.is_set() else train.BY_COST if self.cost.is_spent() else 0.0


def remaining(job: Job, network: Network, training: Run, bad_files: dict[str, BadFile]) -> Iterator[Stage]:
    """The stages that remain, each prepared when its turn comes; what cannot be decoded is added to `bad_files`."""
    settings = job.settings
    if settings.head_epochs and training.progress.stage != "all":
        yield _head_stage(job, network, bad_files)
    if settings.epochs:
        yield _all_stage(job, network, bad_files)


def note_unreadable(job: Job, bad_files: dict[str, BadFile], paths: Iterable[str]) -> None:
    """Remembers pictures that did not decode, with what is wrong with them now."""
    for path in paths:
        if path not in bad_files:
            full_path, reason = f"{job.settings.data_dir}/{path}", ""
            if job.folder.pack:
                reason = "the shard is damaged there: run trainer.pack again"
            elif storage.is_remote(full_path):
                reason = examples.check_contents(job.pictures.read(path)).reason
            else:
                reason = examples.check_file(full_path).reason
            bad_files[path] = BadFile(path, reason or "cannot be decoded")
            logging.warning("%s is left out: %s.", full_path, bad_files[path].reason)


def check_bad_files(job: Job, bad_files: dict[str, BadFile]) -> None:
    """Raises UserError once they are too many; not where they are noted, which is inside tf.data, which would wrap it."""
    total = len(job.folder.examples) + len(job.folder.bad_files)
    examples.check_bad_fraction(len(bad_files), total, list(bad_files.values())[:1], job.settings.max_bad_fraction)


def _head_stage(job: Job, network: Network, bad_files: dict[str, BadFile]) -> Stage:
    """The head over the backbone's features of all pictures, which are computed here or read if they were before."""
    settings, everything = job.settings, job.pictures.paths
    infer = train.inference(lambda x: network.backbone(x, training=False), job.devices)
    finish = data.Finish(settings.preprocessing, None, network.backbone.compute_dtype)
    batch_size = INFERENCE_BATCH * job.devices.replicas

    def compute(start: int, end: int) -> train.Outputs:
        layout = data.ordered_epoch(end - start, batch_size=batch_size, replicas=job.devices.replicas)
        _decode_if_kept(job)
        source = job.pictures.source(np.arange(start, end))
        labels = np.zeros(end - start, np.int32)
        batches = data.batches(layout, source, labels, finish=finish, devices=job.devices)
        with job.terminal.pass_over("computing features", end - start) as bar:
            return train.collect(infer, batches, layout, on_batch=bar.update, wish_to_stop=job.wish_to_stop)

    source = model.weights_identity(settings.weights)
    name = features.key(
        job.pictures.hashes, source, settings.image_size, settings.preprocessing, settings.head, job.precision
    )
    directory = settings.cache_dir or job.paths.checkpoints
    logging.info("Features of %d pictures: from %s, or computed once and kept there.", len(everything), directory)
    outputs = features.compute_once(directory, name, len(everything), compute, is_chief=job.me.is_chief)
    note_unreadable(job, bad_files, everything[~outputs.is_readable])
    check_bad_files(job, bad_files)
    tables = [
        data.Table(tf.constant(outputs.values[place]), tf.constant(outputs.is_readable[place].astype(np.float32)))
        for place in job.pictures.places
    ]
    recipe = _recipe(settings, settings.head_learning_rate)
    return _stage(job, "head", settings.head_epochs, recipe, (None, network.head), tables, lambda epoch: None)


def _all_stage(job: Job, network: Network, bad_files: dict[str, BadFile]) -> Stage:
    """The whole network over the pictures: from the files in each epoch, or decoded once."""
    settings = job.settings
    compute_dtype = network.backbone.compute_dtype

    def finish(epoch: int | None) -> data.Finish:
        seed = (settings.seed, epoch) if settings.augment and epoch is not None else None
        return data.Finish(settings.preprocessing, seed, compute_dtype)

    _decode_if_kept(job)
    sources = [job.pictures.source(place) for place in job.pictures.places]
    check_bad_files(job, bad_files)
    recipe = _recipe(settings, settings.learning_rate)
    stage = _stage(job, "all", settings.epochs, recipe, (network.backbone, network.head), sources, finish)
    is_worth_caching = settings.epochs > 1 and not job.pictures.is_kept
    return stage._replace(
        if_input_is_slow="Try --cache=memory, or pack the folder." if is_worth_caching else "More processor cores help."
    )


def _decode_if_kept(job: Job) -> None:
    if job.pictures.num_undecoded:
        with job.terminal.pass_over("decoding pictures", job.pictures.num_undecoded) as bar:
            job.pictures.decode(bar.update, job.me.index)


def _recipe(settings: Config, learning_rate: float) -> train.Recipe:
    values = {name: getattr(settings, name) for name in train.Recipe._fields}
    return train.Recipe(**{**values, "learning_rate": learning_rate})


def _stage(
    job: Job, name: str, epochs: int, recipe: train.Recipe, networks: tuple, sources: list, finish: Callable
) -> Stage:
    """A Stage over two sources; `finish(epoch)` tells what is done to a batch, of validation for None."""
    settings, (training, validation) = job.settings, job.sides
    weights = data.class_weights(training.labels, len(job.folder.class_names), settings.class_weight)
    steps_per_epoch = -(-len(training) // settings.batch_size)
    backbone, head = networks

    def make_loop(learning_rate_factor: float) -> train.Loop:
        with job.devices.strategy.scope():
            optimizer = train.make_optimizer(
                recipe._replace(learning_rate=recipe.learning_rate * learning_rate_factor),
                epochs=epochs,
                steps_per_epoch=steps_per_epoch,
                loss_scaling=name == "all" and job.precision == "mixed_float16",
            )
        return train.Loop(
            backbone,
            head,
            optimizer,
            devices=job.devices,
            batch_size=settings.batch_size,
            seed=settings.seed,
            label_smoothing=recipe.label_smoothing,
            dropout=recipe.dropout,
            jit_compile=job.xla and name == "all",
        )

    def training_batches(epoch: int, first_step: int) -> tuple[data.Epoch, Iterable]:
        layout = data.training_epoch(
            training.labels,
            seed=settings.seed,
            epoch=epoch,
            batch_size=settings.batch_size,
            replicas=job.devices.replicas,
            class_weights=weights,
        )
        return layout, data.batches(
            layout, sources[0], training.labels, finish=finish(epoch), devices=job.devices, first_step=first_step
        )

    def validation_batches() -> tuple[data.Epoch, Iterable]:
        batch_size = INFERENCE_BATCH * job.devices.replicas
        layout = data.ordered_epoch(len(validation), batch_size=batch_size, replicas=job.devices.replicas)
        return layout, data.batches(layout, sources[1], validation.labels, finish=finish(None), devices=job.devices)

    # The steps to profile are those of the network's stage, or of the head where that is all there is.
    is_profiled = (name == "all" or not settings.epochs) and job.me.is_chief
    steps = config.profile_range(settings) if is_profiled else None
    profile = train.Profile(settings.tensorboard_dir, *steps) if steps else None
    stage = Stage(name, epochs, make_loop, training_batches, validation_batches, training.paths)
    return stage._replace(profile=profile)
