"""Features of a folder of images, computed as a job computes those of its head, without a job."""

import numpy as np

from trainer import cli
from trainer.config import Config
from trainer.data.dataset import Examples, Folder, Split
from trainer.data.image_source import ImageSource
from trainer.data.input_pipeline import ImageCache
from trainer.models import backbones, networks
from trainer.runtime import cluster, devices
from trainer.training import interruption, stages
from trainer.training.cost import Cost
from trainer.training.inference import ModelOutputs
from trainer.training.progress import ProgressReporter
from trainer.training.stages import StageInputs
from trainer.training.trainer import HEAD


def compute(data_dir: str, examples: Examples, class_names: tuple[str, ...], settings: Config) -> ModelOutputs:
    """Features float32 [N, F] of N examples by the backbone of `settings`, in their order, on the devices of this machine.

    Raises UserError if the weights are not available or do not fit, OSError if a bucket cannot be read.
    """
    machine = devices.start(cluster.resolve({}), require_gpu=False)
    precision, _ = devices.choose_precision(settings.precision, machine.kind)
    network_input = backbones.input_from_flags(settings.as_dict())
    with machine.strategy.scope():
        network = networks.build(
            num_classes=len(class_names),
            image_size=settings.image_size,
            backbone=settings.backbone,
            weights=settings.weights,
            head=settings.head,
            precision=precision,
            seed=settings.seed,
        )
    split = Split(examples, examples.take(np.zeros(0, int)))
    images = ImageSource(
        data_dir,
        Folder(class_names, examples, ()),
        split,
        network_input=network_input,
        cache=ImageCache(is_used=False),
        cache_dir="",
        read_parallelism=settings.read_parallelism,
        max_bad_fraction=1.0,
    )
    inputs = StageInputs(
        network=network,
        devices=machine,
        images=images,
        split=split,
        class_weights=np.ones(len(class_names), np.float32),
        batch_size=settings.batch_size,
        accumulate_steps=settings.accumulate_steps,
        seed=settings.seed,
        network_input=network_input,
        precision=precision,
        xla=False,
        is_chief=True,
        worker_index=0,
        progress=ProgressReporter(shows_bars=cli.shows_bars(), last_stage=HEAD, cost=Cost(0.0, 1, 0.0)),
        stop_requested=interruption.never,
    )
    outputs = stages.compute_features(inputs)
    return ModelOutputs(*(values[images.split_indices[0]] for values in outputs))
