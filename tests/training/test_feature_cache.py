"""Features are computed once and kept in parts."""

import numpy as np
import pytest
import tensorflow as tf

from trainer.runtime.devices import Devices
from trainer.training import feature_cache
from trainer.training.inference import ModelOutputs
from trainer.training.interruption import StopReason, TrainingInterrupted

ONE_CPU = Devices(tf.distribute.get_strategy(), "CPU", ("CPU:0",), 1, 1, 0)
NUM_EXAMPLES = 10


class Backbone:
    """Computes the index of each example as its feature, in batches of 2, and is interrupted after some batches."""

    def __init__(self, *, batches_until_stop: int = 1000):
        self.computed, self._batches_left = [], batches_until_stop

    def compute(self, start, stop, on_batch):
        self.computed.append((start, stop))
        for first in range(start, stop, 2):
            if not self._batches_left:
                raise TrainingInterrupted(StopReason.SIGNAL)
            self._batches_left -= 1
            on_batch(outputs_of(first, min(first + 2, stop)))
        return outputs_of(start, stop)


def outputs_of(start: int, stop: int) -> ModelOutputs:
    return ModelOutputs(np.arange(start, stop, dtype=np.float32)[:, None], np.ones(stop - start, bool))


def get(directory, backbone: Backbone, name="k") -> list[float]:
    outputs = feature_cache.load_or_compute(
        str(directory), name, NUM_EXAMPLES, backbone.compute, is_chief=True, devices=ONE_CPU
    )
    assert outputs.is_readable.all()
    return outputs.values.ravel().tolist()


def test_features_are_computed_once_and_damaged_parts_again(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "EXAMPLES_PER_PART", 4)
    backbone = Backbone()
    for _ in range(2):
        assert get(tmp_path, backbone) == list(range(NUM_EXAMPLES))
    assert backbone.computed == [(0, 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"features-k-{start:09d}.npz" for start in (0, 4, 8)]
    (tmp_path / "features-k-000000004.npz").write_bytes(b"damaged")
    assert get(tmp_path, backbone) == list(range(NUM_EXAMPLES))
    assert backbone.computed[1:] == [(4, 8)]
    get(tmp_path, backbone, feature_cache.cache_key("other"))
    assert backbone.computed[2:] == [(0, 10)]


def test_a_stop_keeps_every_complete_batch_and_says_how_many(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    with pytest.raises(TrainingInterrupted):
        get(tmp_path, Backbone(batches_until_stop=3))
    assert f"Features of 6 of 10 images are kept in {tmp_path}" in caplog.text
    backbone = Backbone()
    assert get(tmp_path, backbone) == list(range(NUM_EXAMPLES))
    assert backbone.computed == [(6, 10)]


def test_a_part_is_kept_after_some_time(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "SECONDS_PER_PART", 0.0)
    get(tmp_path, Backbone())
    assert len(list(tmp_path.iterdir())) == NUM_EXAMPLES // 2
