"""Suite `bucket`, with local folders in place of buckets; tests/end_to_end/test_bucket.py has an emulated bucket."""

import pytest

from tests.support.images import write_images
from trainer.benchmarks import bucket, results
from trainer.data import shard_writer
from trainer.data.dataset import read_folder
from trainer.errors import UserError


@pytest.mark.slow
def test_one_measurement_gives_the_metrics_of_all_baselines(tmp_path):
    images = write_images(tmp_path / "images", {"a": 20, "b": 20}, size=64)
    packed = str(tmp_path / "packed")
    folder = read_folder(str(images))
    shard_writer.write_shards(folder, lambda path: (images / path).read_bytes(), packed, shard_bytes=10**6)
    suite = bucket.bucket_suite(str(images), str(images), packed, image_size=32)
    metrics = results.measure(suite, rounds=1)["figures"]
    assert list(metrics) == ["local disk", "one by one", "folder", "shards", "cache"]
    assert all(values["images_per_second"][0] > 0 for values in metrics.values())


def test_a_folder_without_shards_is_an_error(tmp_path):
    images = write_images(tmp_path / "images", {"a": 2, "b": 2})
    suite = bucket.bucket_suite(str(images), str(images), str(images), image_size=32)
    with pytest.raises(UserError, match="contains no shards: run trainer"):
        suite.baselines[0].measure()
