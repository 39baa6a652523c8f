"""What job.py derives from the flags."""

from types import SimpleNamespace

from trainer import job
from trainer.artifacts.job_dir import JobDir
from trainer.config import Config
from trainer.training.trainer import HEAD


def feature_source(monkeypatch, **flags) -> tuple:
    """What the cached features of a job with these flags depend on."""
    monkeypatch.setattr(job.stages, "head_stage", lambda inputs, **arguments: arguments["feature_source"])
    settings = Config(job_dir="job", **flags)
    prepared = job.PreparedJob(
        settings=settings,
        cluster=None,
        folder=None,
        split=None,
        split_origin="",
        fingerprint="",
        profile_range=None,
        epochs_reason="",
        stop=None,
        report_metrics=None,
    )
    stub = SimpleNamespace(settings=settings, prepared=prepared, is_chief=True, paths=JobDir("job"))
    return job._make_stage(stub, None, HEAD)


def test_cached_features_are_of_one_backbone_and_one_input(monkeypatch):
    changes = [{}, {"backbone": "ResNet101"}, {"resize": "pad"}, {"resize": "crop"}, {"image_size": 96},
               {"preprocessing": "rescale"}, {"head": "flatten"}]  # fmt: skip
    sources = [repr(feature_source(monkeypatch, **flags)) for flags in changes]
    assert len(set(sources)) == len(changes)
    assert repr(feature_source(monkeypatch, learning_rate=0.5, seed=3)) == sources[0]
