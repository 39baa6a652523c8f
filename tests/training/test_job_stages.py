from types import SimpleNamespace

import pytest

from trainer.config import Config
from trainer.models import backbones
from trainer.training import feature_cache, job_stages, stages
from trainer.training.trainer import HEAD, WHOLE_NETWORK


def feature_source(**flags) -> tuple:
    settings = Config(**flags)
    return job_stages.feature_source(
        settings, SimpleNamespace(network_input=backbones.input_from_flags(settings.as_dict()))
    )


def test_cached_features_are_of_one_backbone_and_one_input():
    changes = [{}, {"backbone": "ResNet101"}, {"resize": "pad"}, {"resize": "crop"}, {"image_size": 96},
               {"preprocessing": "rescale"}, {"head": "flatten"}]  # fmt: skip
    sources = [repr(feature_source(**flags)) for flags in changes]
    assert len(set(sources)) == len(changes)
    assert repr(feature_source(learning_rate=0.5, seed=3)) == sources[0]


def test_features_of_a_folded_backbone_have_the_key_of_earlier_ones_where_they_differ_by_rounding_alone():
    def name(precision: str) -> str:
        inputs = SimpleNamespace(images=SimpleNamespace(hashes=("h",)), precision=precision)
        return stages._feature_name(inputs, ("source",))

    def earlier_name(precision: str) -> str:
        return feature_cache.cache_key(("h",), "source", precision)

    assert name("float32") == earlier_name("float32")
    assert name("mixed_bfloat16") != earlier_name("mixed_bfloat16")


@pytest.mark.parametrize(
    ("kind", "precision", "cores", "size"),
    [
        ("CPU", "float32", 2, 16),
        ("CPU", "float32", 48, 48),
        ("CPU", "float32", 256, 64),
        ("CPU", "mixed_bfloat16", 2, 64),
        ("GPU", "float32", 2, 64),
    ],
)
def test_features_are_computed_in_small_batches_where_those_need_less_memory(kind, precision, cores, size, monkeypatch):
    monkeypatch.setattr(stages.os, "cpu_count", lambda: cores)
    assert stages.feature_batch_size(kind, precision) == size


def test_pretrained_weights_are_fine_tuned_at_a_relative_rate():
    tuned = job_stages.recipe_of(Config(), WHOLE_NETWORK)
    assert (tuned.optimizer, tuned.learning_rate, tuned.warmup_epochs) == ("lamb", 3e-4, -1)
    assert job_stages.recipe_of(Config(weights="none", head_epochs=0, epochs=1), WHOLE_NETWORK).optimizer == "adam"
    assert job_stages.recipe_of(Config(optimizer="sgd"), WHOLE_NETWORK).optimizer == "sgd"
    head = job_stages.recipe_of(Config(), HEAD)
    assert (head.optimizer, head.learning_rate, head.warmup_epochs) == ("adam", 1e-3, 0)
