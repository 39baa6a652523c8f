"""Batches from files and from arrays: the same values, and unreadable images have weight 0."""

import numpy as np
import psutil
import pytest
import tensorflow as tf

from tests.support import corpus
from tests.support.images import write_images
from trainer.data import input_pipeline, sampler
from trainer.data.dataset import read_folder
from trainer.data.input_pipeline import ArraySource, BatchTransform, FileSource, ImageCache
from trainer.data.preprocessing import Augmentation, NetworkInput, preprocess
from trainer.errors import UserError
from trainer.runtime.devices import Devices

ONE = Devices(tf.distribute.get_strategy(), "CPU", ("CPU:0",), 1, 1, 0)
NETWORK_INPUT = NetworkInput(image_size=32, resize="stretch", preprocessing="rescale")
UNREADABLE = [1, 3, 5]


def plan_of(num_examples, *, epoch=0, batch_size=8, replicas=1, seed=0):
    labels = np.arange(num_examples) % 2
    return sampler.shuffled_epoch(
        labels, seed=seed, epoch=epoch, batch_size=batch_size, replicas=replicas, class_weights=np.ones(2, np.float32)
    )


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, {"a": 12, "b": 9})
    return tmp_path, read_folder(str(tmp_path)).examples


def file_source(directory, paths, on_unreadable=lambda index: None) -> FileSource:
    return FileSource(directory=str(directory), paths=paths, network_input=NETWORK_INPUT, on_unreadable=on_unreadable)


def collect(plan, source, labels, **more):
    transform = BatchTransform("rescale", Augmentation(0, 0, strength="basic", flips=True), "float32")
    return [
        {name: value.numpy() for name, value in batch.items()}
        for batch in input_pipeline.batches(plan, source, labels, transform=transform, devices=ONE, **more)
    ]


@pytest.mark.slow
def test_files_and_decoded_arrays_give_the_same_batches(folder, tmp_path_factory):
    directory, images = folder
    source = file_source(directory, images.paths)
    disk = str(tmp_path_factory.mktemp("cache") / "pictures.npy")
    plan = plan_of(21)
    from_files = collect(plan, source, images.labels)
    for path in ("", disk):
        from_table = collect(plan, input_pipeline.decode_all(source, path, lambda done: None), images.labels)
        assert len(from_files) == len(from_table) == 3
        for one, other in zip(from_files, from_table, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


def test_a_pass_over_an_array_does_not_copy_it():
    values = input_pipeline.page_aligned((50_000, 2048), np.float32)
    values[:] = np.arange(50_000)[:, None]  # 410 MB
    source = input_pipeline.array_source(values, np.ones(50_000, bool))
    plan, memory = sampler.ordered_epoch(50_000, batch_size=500, replicas=1), psutil.Process().memory_info
    before = memory().rss
    iterator = iter(input_pipeline.batches(plan, source, np.zeros(50_000, int), transform=None, devices=ONE))
    first = next(iterator)["x"].numpy()
    assert memory().rss - before < 100e6
    rest = [batch["x"].numpy() for batch in iterator]
    np.testing.assert_array_equal(np.concatenate([first, *rest]), values)


def test_an_array_that_is_not_aligned_is_copied():
    values = np.frombuffer(bytearray(4 * 201), np.float32)[1:].reshape(100, 2)
    source = input_pipeline.array_source(values, np.ones(100, bool))
    np.testing.assert_array_equal(source.values, values)
    assert "CPU" in source.values.device


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("preprocessing", ["caffe", "torch", "tf", "rescale"])
def test_compiled_preprocessing_equals_that_of_serving(preprocessing, dtype):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    table = ArraySource(tf.constant(images), tf.ones(4))
    plan = sampler.ordered_epoch(4, batch_size=4, replicas=1)
    transform = BatchTransform(preprocessing, None, dtype)
    (batch,) = input_pipeline.batches(plan, table, np.zeros(4, np.int64), transform=transform, devices=ONE)
    served = tf.cast(preprocess(tf.constant(images), preprocessing), dtype)
    assert batch["x"].dtype == dtype
    np.testing.assert_array_equal(batch["x"].numpy(), served.numpy())


@pytest.mark.slow
def test_a_later_first_step_gives_the_rest_of_the_epoch(folder):
    directory, images = folder
    source = file_source(directory, images.paths)
    plan = plan_of(21)
    whole = collect(plan, source, images.labels)
    rest = collect(plan, source, images.labels, first_step=2)
    assert len(rest) == 1
    for name, value in rest[0].items():
        np.testing.assert_array_equal(value, whole[2][name])


@pytest.mark.slow
@pytest.mark.parametrize("is_cached", [False, True])
def test_an_unreadable_image_has_weight_0_and_is_reported(folder, is_cached):
    directory, images = folder
    (directory / images.paths[3]).write_bytes(b"\xff\xd8\xff gone bad")
    (directory / images.paths[7]).unlink()
    unreadable = []
    source = file_source(directory, images.paths, unreadable.append)
    if is_cached:
        source = input_pipeline.decode_all(source, "", lambda done: None)
    batches = collect(plan_of(21), source, images.labels)
    assert sorted(set(unreadable)) == [3, 7]
    assert sum(batch["weight"].sum() for batch in batches) == 19
    assert all(np.isfinite(batch["x"]).all() for batch in batches)


def test_a_cache_that_does_not_fit_is_refused(tmp_path):
    def choose(cache, num_bytes=1000, passes=3, directory=str(tmp_path)):
        return input_pipeline.choose_cache(cache, num_bytes=num_bytes, passes=passes, directory=directory)

    assert choose("auto") == ImageCache(True)
    assert choose("auto", passes=1) == ImageCache(False)
    assert choose("none") == ImageCache(False)
    assert choose("auto", num_bytes=2**60) == ImageCache(False)
    assert choose("disk").path("a") == f"{tmp_path}/pictures-a.npy"
    with pytest.raises(UserError, match="--cache=memory needs"):
        choose("memory", num_bytes=2**60)
    with pytest.raises(UserError, match="--cache=disk needs"):
        choose("disk", num_bytes=2**60)
    with pytest.raises(UserError, match="needs a local folder, not gs://bucket"):
        choose("disk", directory="gs://bucket/x")


@pytest.fixture
def gone_bad(tmp_path):
    """Nine images: the second is deleted, the fourth is cut, the sixth is text, the eighth is a good PNG."""
    directory = write_images(tmp_path, {"a": 9})
    paths = sorted((directory / "a").iterdir())
    paths[1].unlink()
    paths[3].write_bytes(paths[3].read_bytes()[:500])
    paths[5].write_text("not an image any more")
    paths[7].write_bytes(corpus.encode(corpus.sample_image(), "PNG"))
    return directory, np.array([f"a/{path.name}" for path in paths], object)


@pytest.mark.slow
def test_unreadable_images_do_not_move_the_others(gone_bad):
    unreadable = []
    source = file_source(gone_bad[0], gone_bad[1], unreadable.append)
    plan = sampler.ordered_epoch(9, batch_size=4, replicas=1)
    transform = BatchTransform("rescale", None, "float32")
    labels = np.arange(9)
    for _ in range(2):  # in each epoch
        unreadable.clear()
        batches = list(input_pipeline.batches(plan, source, labels, transform=transform, devices=ONE))
        weight = np.concatenate([batch["weight"] for batch in batches])
        label = np.concatenate([batch["label"] for batch in batches])
        is_zero = np.concatenate([batch["x"].numpy().reshape(4, -1).max(axis=1) == 0 for batch in batches])
        assert sorted(set(unreadable)) == UNREADABLE
        assert label[:9].tolist() == list(range(9))
        assert np.flatnonzero(weight[:9] == 0).tolist() == UNREADABLE == np.flatnonzero(is_zero[:9]).tolist()
        assert np.concatenate([batch["loss_weight"] for batch in batches])[UNREADABLE].tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("is_on_disk", [False, True])
def test_a_cache_marks_unreadable_images(gone_bad, tmp_path, is_on_disk):
    unreadable = []
    source = file_source(gone_bad[0], gone_bad[1], unreadable.append)
    table = input_pipeline.decode_all(source, str(tmp_path / "cache.npy") if is_on_disk else "", lambda count: None)
    assert sorted(unreadable) == UNREADABLE
    assert np.flatnonzero(table.is_readable == 0).tolist() == UNREADABLE
    assert np.flatnonzero(table.values.numpy().reshape(9, -1).max(axis=1) == 0).tolist() == UNREADABLE
