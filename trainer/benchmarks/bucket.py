"""How fast pictures come out of a bucket, in each of the ways that this job has, against a local disk."""

import functools
import os
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer import config
from trainer.benchmarks.suite import Baseline, Suite, Values, one_device
from trainer.data import input_pipeline, sampler, shards
from trainer.data.dataset import read_folder
from trainer.data.preprocessing import decode_image
from trainer.errors import UserError
from trainer.runtime.devices import Devices
from trainer.storage import files


def measure(
    local_dir: str, folder_url: str, packed_url: str, *, devices: Devices, image_size: int = 224, one_by_one: int = 40
) -> dict[str, float]:
    """Pictures per second, read and decoded to batches, of the same pictures in a local folder, a bucket, and packed there.

    `one by one`: each read when the one before is decoded, of so many pictures. `folder`: as the job reads a folder in a
    bucket. `shards`: fetched and read, the fetching included. `cache`: a second pass over pictures kept decoded. Raises
    OSError.
    """
    paths = read_folder(local_dir).examples.paths

    pack = read_folder(packed_url).pack
    if not pack:
        raise UserError(f"{packed_url} holds no shards: run trainer.pack into it first.")

    def rate_of(source: input_pipeline.ArraySource | input_pipeline.FileSource, seconds: float = 0.0) -> float:
        layout = sampler.ordered_epoch(len(paths), batch_size=32, replicas=1)
        finish = input_pipeline.BatchTransform("rescale", None, "float32")
        labels = np.zeros(len(paths), np.int32)
        seen, started, before = 0, 0.0, 0
        for batch in input_pipeline.batches(layout, source, labels, finish=finish, devices=devices):
            seen += int(tf.reduce_sum(batch["weight"]))
            if not started:  # what comes before is mostly TensorFlow's preparing the graph, once an epoch
                started, before = time.monotonic(), seen
        if seen != len(paths):
            raise OSError(f"{len(paths) - seen} of {len(paths)} pictures could not be read")
        return (seen - before) / (time.monotonic() - started + seconds)

    def rate_one_by_one() -> float:
        started = time.monotonic()
        for path in paths[:one_by_one]:
            decode_image(tf.io.read_file(files.join(folder_url, path)), image_size)
        return min(one_by_one, len(paths)) / (time.monotonic() - started)

    def source_of(
        directory: str, read: Callable[[str], bytes] | None = None, parallelism: int = 0
    ) -> input_pipeline.FileSource:
        return input_pipeline.FileSource(directory, paths, image_size, lambda index: None, read, parallelism)

    def from_bucket(path: str) -> bytes:
        return shards.read(folder_url, path) or b""

    def rate_of_shards() -> float:
        started = time.monotonic()
        read = shards.fetch(pack, "", lambda count: None)
        return rate_of(source_of("", read), time.monotonic() - started)

    decode_image(tf.io.read_file(os.path.join(local_dir, paths[0])), image_size)  # what happens only once
    folder = source_of(folder_url, from_bucket, config.REMOTE_READ_PARALLELISM)
    table = input_pipeline.decode_all(folder, "", lambda count: None)
    return {
        "local disk": rate_of(source_of(local_dir)),
        "one by one": rate_one_by_one(),
        "folder": rate_of(folder),
        "shards": rate_of_shards(),
        "cache": rate_of(table),
    }


# ---- bucket


def bucket_suite(local_dir: str, folder_url: str, packed_url: str, *, image_size: int) -> Suite:
    """The same pictures on a local disk, in a bucket and packed there; one measurement gives the figures of all."""
    names = ("local disk", "one by one", "folder", "shards", "cache")
    latest: dict[str, float] = {}

    def measure(name: str) -> Values:
        if name == names[0]:
            indices = (local_dir, folder_url, packed_url)
            latest.update(measure(*indices, devices=one_device(), image_size=image_size))
        return {"images_per_second": latest[name]}

    baselines = [Baseline(name, functools.partial(measure, name)) for name in names]
    return Suite("bucket", f"pictures from a bucket, {image_size} pixels", "images_per_second", baselines, [], [])
