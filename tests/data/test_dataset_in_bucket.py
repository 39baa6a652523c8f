"""A folder in a bucket is read as the same folder on a disk."""

import numpy as np
import pytest

from tests.support.bucket import upload
from tests.support.images import write_images
from trainer.data import file_checks, input_pipeline, sampler, splits
from trainer.data.dataset import Folder, read_folder
from trainer.data.image_source import ImageSource
from trainer.data.preprocessing import NetworkInput
from trainer.runtime import cluster, devices
from trainer.storage import gcs


def assert_same_folder(one: Folder, other: Folder) -> None:
    assert one.class_names == other.class_names
    assert one.bad_files == other.bad_files
    assert (one.formats, one.split_folders) == (other.formats, other.split_folders)
    for name in ("paths", "labels", "hashes"):
        np.testing.assert_array_equal(getattr(one.examples, name), getattr(other.examples, name))


def test_a_folder_in_a_bucket_is_read_as_on_disk(tmp_path, bucket_url):
    data = write_images(tmp_path / "data", {"cat": 6, "dog": 5}, size=60)
    image = (data / "cat" / "cat_000.jpg").read_bytes()
    (data / "dog" / "deep" / "er").mkdir(parents=True)
    names = {
        "dog/deep/er/a b#c?d%20é.jpg": image,
        "dog/same.jpg": image,
        "dog/large.jpg": image[:-2] + bytes(file_checks.HEAD_BYTES) + b"\xff\xd9",
        "dog/large_and_cut.jpg": image[:-2] + bytes(file_checks.HEAD_BYTES),
        "dog/large_with_a_film_behind.jpg": image + bytes(file_checks.HEAD_BYTES),
        "dog/large_text.jpg": b"text" * file_checks.HEAD_BYTES,
        "cat/empty.jpg": b"",
        "cat/cut.jpg": image[:-30],
        "cat/page.jpg": b"<html>",
        "cat/Thumbs.db": b"x",
        ".hidden/x.jpg": image,
        "cat/.x.jpg": image,
        "at_the_root.jpg": image,
    }
    for name, contents in names.items():
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(contents)
    (data / "dog" / "folder.jpg").mkdir()
    (data / "dog" / "folder.jpg" / "x.jpg").write_bytes(image)
    upload(data, f"{bucket_url}/some/data")
    gcs.write(f"{bucket_url}/some/data/cat/", b"")  # the console's placeholder of a folder
    gcs.write(f"{bucket_url}/some/data-2/owl/x.jpg", image)  # another folder whose name begins with the same letters
    assert_same_folder(read_folder(f"{bucket_url}/some/data/"), read_folder(str(data)))


def test_a_given_split_in_a_bucket_is_used(tmp_path, bucket_url):
    for side in ("train", "val"):
        write_images(tmp_path / side, {"a": 2, "b": 2}, seed=len(side))
    upload(tmp_path, bucket_url)
    assert_same_folder(read_folder(bucket_url), read_folder(str(tmp_path)))


def test_an_object_without_md5_is_read(tmp_path, bucket_url, monkeypatch):
    upload(write_images(tmp_path, {"a": 2, "b": 2}), bucket_url)
    listed = gcs.list_tree
    monkeypatch.setattr(gcs, "list_tree", lambda url: {
        name: known._replace(content_hash="", num_bytes=10**6) for name, known in listed(url).items()
    })  # fmt: skip
    assert_same_folder(read_folder(bucket_url), read_folder(str(tmp_path)))


@pytest.mark.slow
def test_a_cached_image_is_fetched_once_for_all_passes(tmp_path, bucket_url):
    images = write_images(tmp_path, {"cat": 40, "dog": 40})
    url = upload(images, f"{bucket_url}/data")
    folder = read_folder(url)
    split = splits.split_by_content(folder.examples, 0.2)
    options = {
        "network_input": NetworkInput(image_size=32, resize="stretch", preprocessing="rescale"),
        "cache": input_pipeline.ImageCache(True),
        "cache_dir": "",
        "read_parallelism": 8,
        "max_bad_fraction": 0.0,
    }
    cached, on_disk = ImageSource(url, folder, split, **options), ImageSource(str(images), folder, split, **options)
    bucket_url.emulator.control(forget=True)
    cached.decode(lambda count: None, worker_index=0)
    machine = devices.start(cluster.resolve({}), require_gpu=False)
    plan = sampler.ordered_epoch(16, batch_size=16, replicas=1)
    transform = input_pipeline.BatchTransform("rescale", None, "float32")
    indices, labels = np.arange(64, 80), np.zeros(16)
    batches = [
        next(iter(input_pipeline.batches(plan, one.source(indices), labels, transform=transform, devices=machine)))
        for one in (cached, on_disk)
    ]
    np.testing.assert_array_equal(batches[0]["x"], batches[1]["x"])
    fetched = [path for method, path, _ in bucket_url.emulator.requests()]
    assert len(fetched) == len(set(fetched)) == 80
