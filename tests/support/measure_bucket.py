"""Measures images per second from a bucket whose responses take 50 ms longer, relative to a local disk. Not a test.

python -m tests.support.measure_bucket [number of images]
"""

import os
import pathlib
import sys
import tempfile

from tests.support import gcs_emulator
from tests.support.bucket import upload
from tests.support.images import write_images
from trainer.data.dataset import read_folder


def measure(num_images: int, delay_seconds: float = 0.05) -> dict[str, float]:
    """Images per second by way of reading, as in trainer.benchmarks.bucket."""
    with gcs_emulator.run() as emulator, tempfile.TemporaryDirectory() as temporary:
        os.environ.update(emulator.environment | gcs_emulator.QUICK_ENVIRONMENT)
        from trainer.benchmarks import bucket
        from trainer.data import shard_writer, shards
        from trainer.runtime import cluster, devices

        local_dir, url = pathlib.Path(temporary) / "images", gcs_emulator.BucketUrl("speed", emulator)
        write_images(local_dir, {"a": num_images // 2, "b": num_images // 2}, size=250)
        folder = read_folder(str(local_dir))
        upload(local_dir, f"{url}/folder")
        shard_writer.write_shards(
            folder, lambda path: shards.read(str(local_dir), path), f"{url}/packed", shard_bytes=2**27
        )
        emulator.control(delay=delay_seconds)
        machine = devices.start(cluster.resolve({}), require_gpu=False)
        return bucket.measure(str(local_dir), f"{url}/folder", f"{url}/packed", devices=machine)


if __name__ == "__main__":
    rates = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    for name, rate in rates.items():
        of_disk, of_sequential = rate / rates["local disk"], rate / rates["one by one"]
        print(f"{name:12} {rate:8.1f} images/s, {of_disk:.2f} of local disk, {of_sequential:.1f} times one by one")
