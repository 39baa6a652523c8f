"""How fast pictures come out of a bucket, in each of the ways that this job has, against a local disk."""

import os
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer import data, examples, image, shards, storage
from trainer.devices import Devices
from trainer.errors import UserError


def measure(
    local_dir: str, folder_url: str, packed_url: str, *, devices: Devices, image_size: int = 224, one_by_one: int = 40
) -> dict[str, float]:
    """Pictures per second, read and decoded to batches, of the same pictures in a local folder, a bucket, and packed there.

    `one by one`: each read when the one before is decoded, of so many pictures. `folder`: as the job reads a folder in a
    bucket. `shards`: fetched and read, the fetching included. `cache`: a second pass over pictures kept decoded. Raises
    OSError.
    """
    paths = examples.read_folder(local_dir).examples.paths

    pack = examples.read_folder(packed_url).pack
    if not pack:
        raise UserError(f"{packed_url} holds no shards: run trainer.pack into it first.")

    def rate_of(source: data.Table | data.Files, seconds: float = 0.0) -> float:
        layout = data.ordered_epoch(len(paths), batch_size=32, replicas=1)
        finish = data.Finish("rescale", None, "float32")
        labels = np.zeros(len(paths), np.int32)
        seen, started, before = 0, 0.0, 0
        for batch in data.batches(layout, source, labels, finish=finish, devices=devices):
            seen += int(tf.reduce_sum(batch["weight"]))
            if not started:  # what comes before is mostly TensorFlow's preparing the graph, once an epoch
                started, before = time.monotonic(), seen
        if seen != len(paths):
            raise OSError(f"{len(paths) - seen} of {len(paths)} pictures could not be read")
        return (seen - before) / (time.monotonic() - started + seconds)

    def rate_one_by_one() -> float:
        started = time.monotonic()
        for path in paths[:one_by_one]:
            image.decode(tf.io.read_file(storage.join(folder_url, path)), image_size)
        return min(one_by_one, len(paths)) / (time.monotonic() - started)

    def files(directory: str, read: Callable[[str], bytes] | None = None, parallelism: int = 0) -> data.Files:
        return data.Files(directory, paths, image_size, lambda index: None, read, parallelism)

    def from_bucket(path: str) -> bytes:
        return shards.read(folder_url, path) or b""

    def rate_of_shards() -> float:
        started = time.monotonic()
        read = shards.stage(pack, "", lambda count: None)
        return rate_of(files("", read), time.monotonic() - started)

    image.decode(tf.io.read_file(os.path.join(local_dir, paths[0])), image_size)  # what happens only once
    folder = files(folder_url, from_bucket, examples.REMOTE_PARALLELISM)
    table = data.decode_all(folder, "", lambda count: None)
    return {
        "local disk": rate_of(files(local_dir)),
        "one by one": rate_one_by_one(),
        "folder": rate_of(folder),
        "shards": rate_of_shards(),
        "cache": rate_of(table),
    }
