"""Batches in which every example counts once, bad pictures not at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import corpus
from tests.support.images import write_images
from trainer.data import input_pipeline, sampler
from trainer.runtime import cluster, devices

SIZE = 32


@pytest.fixture(scope="module")
def one_device():
    return devices.start(cluster.resolve({}), require_gpu=False)


@pytest.fixture
def gone_bad(tmp_path):
    """Nine pictures of which the second has vanished, the fourth is half, the sixth is text, the eighth a good PNG."""
    directory = write_images(tmp_path, {"a": 9})
    paths = sorted((directory / "a").iterdir())
    paths[1].unlink()
    paths[3].write_bytes(paths[3].read_bytes()[:500])
    paths[5].write_text("no picture any more")
    paths[7].write_bytes(corpus.encode(corpus.photograph(), "PNG"))
    return directory, np.array([f"a/{path.name}" for path in paths], object)


BAD = [1, 3, 5]


@pytest.mark.slow
def test_a_picture_gone_bad_has_weight_0_and_is_told_and_the_others_keep_their_places(gone_bad, one_device):
    told = []
    found_files = input_pipeline.FileSource(str(gone_bad[0]), gone_bad[1], SIZE, told.append)
    layout = sampler.ordered_epoch(9, batch_size=4, replicas=1)
    finish = input_pipeline.BatchTransform("rescale", None, "float32")
    labels = np.arange(9)
    for _ in range(2):  # in each epoch anew
        told.clear()
        batches = list(input_pipeline.batches(layout, found_files, labels, transform=finish, devices=one_device))
        weight = np.concatenate([batch["weight"] for batch in batches])
        label = np.concatenate([batch["label"] for batch in batches])
        is_zero = np.concatenate([batch["x"].numpy().reshape(4, -1).max(axis=1) == 0 for batch in batches])
        assert sorted(set(told)) == BAD
        assert label[:9].tolist() == list(range(9))
        assert np.flatnonzero(weight[:9] == 0).tolist() == BAD == np.flatnonzero(is_zero[:9]).tolist()
        assert np.concatenate([batch["loss_weight"] for batch in batches])[BAD].tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("is_on_disk", [False, True])
def test_a_cache_holds_what_could_be_read_and_says_what_could_not(gone_bad, tmp_path, is_on_disk):
    told = []
    found_files = input_pipeline.FileSource(str(gone_bad[0]), gone_bad[1], SIZE, told.append)
    table = input_pipeline.decode_all(
        found_files, str(tmp_path / "cache.npy") if is_on_disk else "", lambda count: None
    )
    assert sorted(told) == BAD
    assert np.flatnonzero(table.is_readable == 0).tolist() == BAD
    assert np.flatnonzero(table.rows.numpy().reshape(9, -1).max(axis=1) == 0).tolist() == BAD


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_balanced_weights_give_each_class_that_is_there_the_same_sum_and_all_the_number_of_pictures(labels):
    labels = np.array(labels)
    weights = sampler.class_weights(labels, 5, "balanced")
    sums = np.bincount(labels, weights=weights[labels], minlength=5)
    present = np.bincount(labels, minlength=5) > 0
    np.testing.assert_allclose(sums[present], len(labels) / 5, rtol=1e-5)
    assert np.isfinite(weights).all()
    assert (sampler.class_weights(labels, 5, "none") == 1).all()
