"""The order is a function of seed and epoch; each example counts once, whoever handles it."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tests.support.images import write_images
from trainer.data import input_pipeline, sampler
from trainer.data.dataset import read_folder
from trainer.data.preprocessing import preprocess
from trainer.errors import UserError
from trainer.runtime.devices import Devices

ONE = Devices(tf.distribute.get_strategy(), "CPU", ("CPU:0",), 1, 1, 0)
NO_WEIGHTS = np.ones(2, np.float32)


def epoch_of(num_examples, *, epoch=0, batch_size=8, replicas=1, seed=0, weights=NO_WEIGHTS):
    labels = np.arange(num_examples) % 2
    return sampler.shuffled_epoch(
        labels, seed=seed, epoch=epoch, batch_size=batch_size, replicas=replicas, class_weights=weights
    )


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 5))
def test_each_example_counts_once_and_each_batch_weighs_one(num_examples, batch_size, replicas):
    layout = epoch_of(num_examples, batch_size=min(batch_size, num_examples), replicas=replicas)
    counted = layout.index[layout.weight > 0]
    assert sorted(counted) == list(range(num_examples))
    np.testing.assert_allclose(layout.loss_weight.sum(axis=(1, 2)), 1, rtol=1e-5)
    assert layout.index.shape[1] == replicas


@given(st.integers(2, 60), st.integers(1, 16), st.integers(2, 5))
def test_the_batches_are_the_same_on_any_number_of_replicas(num_examples, batch_size, replicas):
    one, many = (epoch_of(num_examples, batch_size=min(batch_size, num_examples), replicas=r) for r in (1, replicas))
    for step in range(one.steps):
        is_one, is_many = one.weight[step] > 0, many.weight[step] > 0
        assert one.index[step][is_one].tolist() == many.index[step][is_many].tolist()
        assert one.row[step][is_one].tolist() == many.row[step][is_many].tolist()


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else():
    first = epoch_of(50).index.tolist()
    assert epoch_of(50).index.tolist() == first
    assert epoch_of(50, epoch=1).index.tolist() != first
    assert epoch_of(50, seed=1).index.tolist() != first


def test_rare_classes_count_for_more_when_asked():
    labels = np.array([0] * 9 + [1] * 3)
    np.testing.assert_allclose(sampler.class_weights(labels, 2, "balanced"), [12 / 18, 12 / 6])
    np.testing.assert_allclose(sampler.class_weights(labels, 2, "none"), [1, 1])


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, {"a": 12, "b": 9})
    return tmp_path, read_folder(str(tmp_path)).examples


def collect(layout, source, labels, **more):
    finish = input_pipeline.BatchTransform("rescale", (0, 0), "float32")
    return [
        {name: value.numpy() for name, value in batch.items()}
        for batch in input_pipeline.batches(layout, source, labels, transform=finish, devices=ONE, **more)
    ]


@pytest.mark.slow
def test_files_and_decoded_tables_in_memory_or_on_disk_give_the_same_batches(folder, tmp_path_factory):
    directory, images = folder
    found_files = input_pipeline.FileSource(str(directory), images.paths, 32, lambda index: None)
    disk = str(tmp_path_factory.mktemp("cache") / "pictures.npy")
    layout = epoch_of(21)
    from_files = collect(layout, found_files, images.labels)
    for path in ("", disk):
        from_table = collect(layout, input_pipeline.decode_all(found_files, path, lambda done: None), images.labels)
        assert len(from_files) == len(from_table) == 3
        for one, other in zip(from_files, from_table, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("preprocessing", ["imagenet", "rescale"])
def test_compiled_preprocessing_gives_the_numbers_of_what_is_served(preprocessing, dtype):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    table = input_pipeline.ArraySource(tf.constant(images), tf.ones(4))
    layout = sampler.ordered_epoch(4, batch_size=4, replicas=1)
    finish = input_pipeline.BatchTransform(preprocessing, None, dtype)
    (batch,) = input_pipeline.batches(layout, table, np.zeros(4, np.int64), transform=finish, devices=ONE)
    served = tf.cast(preprocess(tf.constant(images), preprocessing), dtype)
    assert batch["x"].dtype == dtype
    np.testing.assert_array_equal(batch["x"].numpy(), served.numpy())


@pytest.mark.slow
def test_a_later_first_step_gives_the_rest_of_the_epoch(folder):
    directory, images = folder
    found_files = input_pipeline.FileSource(str(directory), images.paths, 32, lambda index: None)
    layout = epoch_of(21)
    whole = collect(layout, found_files, images.labels)
    rest = collect(layout, found_files, images.labels, first_step=2)
    assert len(rest) == 1
    for name, value in rest[0].items():
        np.testing.assert_array_equal(value, whole[2][name])


@pytest.mark.slow
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_picture_that_went_bad_weighs_nothing_and_is_told(folder, is_cached):
    directory, images = folder
    (directory / images.paths[3]).write_bytes(b"\xff\xd8\xff gone bad")
    (directory / images.paths[7]).unlink()
    told = []
    source = input_pipeline.FileSource(str(directory), images.paths, 32, told.append)
    if is_cached:
        source = input_pipeline.decode_all(source, "", lambda done: None)
    batches = collect(epoch_of(21), source, images.labels)
    assert sorted(set(told)) == [3, 7]
    assert sum(batch["weight"].sum() for batch in batches) == 19
    assert all(np.isfinite(batch["x"]).all() for batch in batches)


def test_the_cache_goes_where_it_fits_and_what_does_not_fit_is_refused_up_front(tmp_path):
    def choose(cache, num_bytes=1000, passes=3, directory=str(tmp_path)):
        return input_pipeline.choose_cache(cache, num_bytes=num_bytes, passes=passes, directory=directory)

    assert choose("auto") == input_pipeline.Cache(True)
    assert choose("auto", passes=1) == input_pipeline.Cache(False)
    assert choose("none") == input_pipeline.Cache(False)
    assert choose("auto", num_bytes=2**60) == input_pipeline.Cache(False)
    assert choose("disk").path("a") == f"{tmp_path}/pictures-a.npy"
    with pytest.raises(UserError, match="--cache=memory needs"):
        choose("memory", num_bytes=2**60)
    with pytest.raises(UserError, match="--cache=disk needs"):
        choose("disk", num_bytes=2**60)
    with pytest.raises(UserError, match="needs a local folder, not gs://bucket"):
        choose("disk", directory="gs://bucket/x")
