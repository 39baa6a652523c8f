"""Pictures per second out of a bucket that answers each request 50 ms late, against a local disk, as a table. Not a test.

python tests/measure_bucket.py [number of pictures]
"""

import os
import pathlib
import sys
import tempfile

from tests.support import gcs_emulator
from tests.support.images import write_images
from trainer.data.dataset import read_folder


def main(num_images: int, delay_seconds: float = 0.05) -> dict[str, float]:
    with gcs_emulator.run() as emulator, tempfile.TemporaryDirectory() as temporary:
        os.environ.update(emulator.environment | gcs_emulator.QUICK_ENVIRONMENT)
        from trainer import pack
        from trainer.benchmarks import bucket
        from trainer.data import shards
        from trainer.runtime import cluster, devices
        from trainer.storage import files, gcs

        local_dir, url = pathlib.Path(temporary) / "pictures", "gs://speed"
        emulator.make_bucket("speed")
        write_images(local_dir, {"a": num_images // 2, "b": num_images // 2}, size=250)
        folder = read_folder(str(local_dir))
        contents = {path: files.read(f"{local_dir}/{path}") for path in folder.examples.paths}
        files.parallel(lambda path: gcs.write(f"{url}/folder/{path}", contents[path]), contents)
        pack.pack(folder, lambda path: shards.read(str(local_dir), path), f"{url}/packed", shard_bytes=2**27)
        emulator.control(delay=delay_seconds)
        machine = devices.start(cluster.resolve({}), require_gpu=False)
        return bucket.measure(str(local_dir), f"{url}/folder", f"{url}/packed", devices=machine)


if __name__ == "__main__":
    rates = main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    print("\n".join(f"{name:12} {rate:8.1f} pictures/s, {rate / rates['local disk']:.2f} of local disk, "
                    f"{rate / rates['one by one']:.1f} times one by one" for name, rate in rates.items()))  # fmt: skip
