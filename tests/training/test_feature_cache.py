"""Features are computed once and kept in parts."""

import numpy as np

from trainer.training import feature_cache
from trainer.training.loop import ModelOutputs


def test_features_are_computed_once_and_damaged_parts_again(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "EXAMPLES_PER_PART", 4)
    computed = []

    def compute(start, stop):
        computed.append((start, stop))
        return ModelOutputs(np.arange(start, stop, dtype=np.float32)[:, None], np.ones(stop - start, bool))

    def get(name="k"):
        return feature_cache.load_or_compute(str(tmp_path), name, 10, compute, is_chief=True).values.ravel().tolist()

    assert get() == list(range(10))
    assert computed == [(0, 4), (4, 8), (8, 10)]
    assert get() == list(range(10))
    assert len(computed) == 3
    (tmp_path / "features-k-000000004.npz").write_bytes(b"damaged")
    assert get() == list(range(10))
    assert computed[3:] == [(4, 8)]
    get(feature_cache.cache_key("other"))
    assert len(computed) == 7
