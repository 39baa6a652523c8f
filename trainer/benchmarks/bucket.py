"""Suite `bucket`: read rates of images in a bucket, in each way that a job reads one, compared with a local disk."""

import functools
import os
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer import config
from trainer.benchmarks.suite import Baseline, Metrics, Suite, one_device
from trainer.data import input_pipeline, sampler, shards
from trainer.data.dataset import read_folder
from trainer.data.preprocessing import NetworkInput, decode_image
from trainer.errors import UserError
from trainer.runtime.devices import Devices
from trainer.storage import files

BASELINES = ("local disk", "one by one", "folder", "shards", "cache")
PREPROCESSING = "rescale"


def bucket_suite(local_dir: str, folder_url: str, packed_url: str, *, image_size: int) -> Suite:
    """The same images on a local disk, in a bucket, and packed in a bucket.

    One call of `measure` gives the metrics of all baselines of a round; it runs when the first baseline is measured.
    """
    latest: dict[str, float] = {}

    def measure_baseline(name: str) -> Metrics:
        if name == BASELINES[0]:
            latest.update(measure(local_dir, folder_url, packed_url, devices=one_device(), image_size=image_size))
        return {"images_per_second": latest[name]}

    baselines = [Baseline(name, functools.partial(measure_baseline, name)) for name in BASELINES]
    return Suite("bucket", f"images from a bucket, {image_size} pixels", "images_per_second", baselines)


def measure(
    local_dir: str, folder_url: str, packed_url: str, *, devices: Devices, image_size: int = 224, one_by_one: int = 40
) -> dict[str, float]:
    """Images per second, read and decoded to batches, for each of BASELINES.

    `one by one` reads and decodes the first `one_by_one` images, one after the other. `folder` reads a folder in a bucket
    as a job does. `shards` reads a pack, the transfer of the shards included. `cache` is a pass over decoded images in
    memory. Raises UserError if `packed_url` holds no shards, OSError if an image cannot be read.
    """
    paths = read_folder(local_dir).examples.paths
    network_input = NetworkInput(image_size, "stretch", PREPROCESSING)
    pack = read_folder(packed_url).pack
    if not pack:
        raise UserError(f"{packed_url} contains no shards: run trainer.pack with this --output_dir first.")

    def make_source(
        directory: str, read: Callable[[str], bytes] | None = None, parallelism: int = 0
    ) -> input_pipeline.FileSource:
        return input_pipeline.FileSource(
            directory=directory,
            paths=paths,
            network_input=network_input,
            on_unreadable=lambda index: None,
            read=read,
            parallelism=parallelism,
        )

    def read_from_bucket(path: str) -> bytes:
        return shards.read(folder_url, path) or b""

    # Decoding one image first keeps the initialization of TensorFlow out of the measurements.
    decode_image(tf.io.read_file(os.path.join(local_dir, paths[0])), network_input)
    folder = make_source(folder_url, read_from_bucket, config.REMOTE_READ_PARALLELISM)
    decoded = input_pipeline.decode_all(folder, "", lambda count: None)
    rates = {
        "local disk": _pipeline_rate(make_source(local_dir), len(paths), devices),
        "one by one": _sequential_rate(folder_url, paths[:one_by_one], network_input),
        "folder": _pipeline_rate(folder, len(paths), devices),
    }
    started = time.monotonic()
    read_from_shards = shards.fetch(pack, "", lambda count: None)
    transfer_seconds = time.monotonic() - started
    rates["shards"] = _pipeline_rate(make_source("", read_from_shards), len(paths), devices, transfer_seconds)
    rates["cache"] = _pipeline_rate(decoded, len(paths), devices)
    return rates


def _pipeline_rate(
    source: input_pipeline.ArraySource | input_pipeline.FileSource,
    num_images: int,
    devices: Devices,
    extra_seconds: float = 0.0,
) -> float:
    """Images per second of one epoch, without its first batch; `extra_seconds` are added to the duration.

    The first batch mostly waits while TensorFlow prepares the graph, once per epoch.
    """
    plan = sampler.ordered_epoch(num_images, batch_size=32, replicas=1)
    transform = input_pipeline.BatchTransform(preprocessing=PREPROCESSING, augmentation=None, dtype="float32")
    labels = np.zeros(num_images, np.int32)
    images_read, images_in_first_batch, started = 0, 0, 0.0
    for batch in input_pipeline.batches(plan, source, labels, transform=transform, devices=devices):
        images_read += int(tf.reduce_sum(batch["weight"]))
        if not started:
            images_in_first_batch, started = images_read, time.monotonic()
    if images_read != num_images:
        raise OSError(f"{num_images - images_read} of {num_images} images could not be read")
    return (images_read - images_in_first_batch) / (time.monotonic() - started + extra_seconds)


def _sequential_rate(folder_url: str, paths: np.ndarray, network_input: NetworkInput) -> float:
    started = time.monotonic()
    for path in paths:
        decode_image(tf.io.read_file(files.join(folder_url, path)), network_input)
    return len(paths) / (time.monotonic() - started)
