"""Fixtures of several test packages."""

import itertools
import os
import re

import pytest

from trainer import cli

for name, value in cli.TENSORFLOW_ENVIRONMENT.items():  # as the commands set it, before TensorFlow is imported
    os.environ.setdefault(name, value)
pytest.register_assert_rewrite("tests.support.browser")  # its asserts show the values that they compare
from tests.support import browser, gcs_emulator, paths, tiny_model  # noqa: E402

# Where the tests themselves run in Kubernetes, on Vertex AI or on Slurm, the commands must still behave as on a laptop.
for name in [name for name in os.environ if name in cli.PLATFORM_VARIABLES or name.startswith(("AIP_", "SLURM"))]:
    del os.environ[name]

_bucket_numbers = itertools.count()


@pytest.fixture(scope="session")
def shared():
    """The folder of real images and weights beside the project, where there is one."""
    if not paths.WEIGHTS.exists():
        pytest.skip(f"{paths.SHARED} does not exist: the real images and weights are beside the project, not in it")
    return paths.SHARED


@pytest.fixture(scope="module")  # while it runs, this thread has an event loop that other tests cannot use
def chromium():
    """Headless Chromium; tests.support.browser opens pages in it and checks them."""
    with browser.launched() as started:
        yield started


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A SavedModel that classifies the images of tiny_model.make_image, as trainer.task exports one."""
    return tiny_model.save(tmp_path_factory.mktemp("tiny") / "saved_model")


@pytest.fixture(scope="session")
def classifier(tiny_model_dir):
    """The classifier of tests.support.tiny_model."""
    from trainer.serving import classifier as classifiers

    return classifiers.load(str(tiny_model_dir))


@pytest.fixture(scope="session")
def _emulator():
    with gcs_emulator.run() as emulator, pytest.MonkeyPatch.context() as patch:
        for name, value in {**emulator.environment, **gcs_emulator.QUICK_ENVIRONMENT}.items():
            patch.setenv(name, value)
        yield emulator


@pytest.fixture
def bucket_url(_emulator, request, monkeypatch):
    """The URL of a new bucket in an emulator without faults, with short retry delays; `.emulator` injects faults."""
    from trainer.storage import gcs

    monkeypatch.setattr(gcs, "_FIRST_DELAY_SECS", 0.01)
    monkeypatch.setattr(gcs, "_MAX_DELAY_SECS", 0.1)
    monkeypatch.setattr(gcs._retries, "timeout_secs", 20.0)
    _emulator.control(faults=[], delay=0.0, forget=True)
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    yield gcs_emulator.BucketUrl(f"{name}-{next(_bucket_numbers)}", _emulator)
    _emulator.control(faults=[], delay=0.0)
