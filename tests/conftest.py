"""What several tests share: small picture folders, the commands as a user runs them, the data beside the project."""

import functools
import itertools
import os
import pathlib
import re
import socket
import subprocess
import sys

import gcs
import numpy as np
import pytest
import tiny_model
from absl import flags
from PIL import Image

from trainer import command

pytest.register_assert_rewrite("browser")  # its asserts tell what they saw
import browser  # noqa: E402

# Where the tests themselves run in Kubernetes or on Vertex AI, the commands are to behave as on a laptop all the same.
for name in [name for name in os.environ if name in command.PLATFORM_VARIABLES or name.startswith("AIP_")]:
    del os.environ[name]

for name, value in command.TENSORFLOW_ENVIRONMENT.items():  # as the commands have it
    os.environ.setdefault(name, value)

_numbers = itertools.count()  # of the buckets

SHARED = pathlib.Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "resnet50_imagenet_pruned_notop.weights.h5"


@pytest.fixture(scope="session")
def shared():
    """The folder of real pictures and weights beside the project, where there is one."""
    if not WEIGHTS.exists():
        pytest.skip(f"{SHARED} is not there: the real pictures and weights lie beside the project, not in it")
    return SHARED


@pytest.fixture(scope="module")  # while it runs, this thread has an event loop that others would stumble over
def chromium():
    """Headless Chromium; tests/browser.py opens pages in it and says what is wrong with them."""
    with browser.launched() as started:
        yield started


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A SavedModel that tells tiny_model.picture's classes apart, as trainer.task exports one."""
    return tiny_model.save(tmp_path_factory.mktemp("tiny") / "saved_model")


def write_pictures(
    directory: pathlib.Path, counts: dict[str, int], *, size: int = 40, seed: int = 0, noise: float = 20
) -> pathlib.Path:
    """Noise around a colour of its own for each class, as JPEG files: easy to tell apart, unless `noise` is large."""
    rng = np.random.default_rng(seed)
    colours = rng.permutation(np.linspace(30, 225, 3 * len(counts))).reshape(-1, 3)
    for colour, (name, count) in zip(colours, counts.items(), strict=True):
        (directory / name).mkdir(parents=True)
        for i in range(count):
            shade = colour + rng.normal(0, noise / 2, 3)
            pixels = np.clip(shade + rng.normal(0, noise, (size, size + 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(directory / name / f"{name}_{i:03d}.jpg", quality=90)
    return directory


def run_command(*arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Runs `python -m ...` in a process of its own, as a user does; output as text."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def flags_of(define_flags) -> flags.FlagValues:
    """The flags that a command defines, apart from those of the process that runs the tests."""
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("string", "integer", "float", "boolean", "enum", "list"):
            define = getattr(flags, f"DEFINE_{kind}")
            patch.setattr(flags, f"DEFINE_{kind}", functools.partial(define, flag_values=values))
        define_flags()
    return values


@pytest.fixture(scope="session")
def _emulator():
    with gcs.run() as emulator, pytest.MonkeyPatch.context() as patch:
        for name, value in {**emulator.environment, **gcs.QUICK_ENVIRONMENT}.items():
            patch.setenv(name, value)
        yield emulator


@pytest.fixture
def bucket_url(_emulator, request):
    """The address of a fresh bucket in an emulator without faults; `bucket_url.emulator` plants them."""
    _emulator.control(faults=[], delay=0.0, forget=True)
    url = gcs.Url("gs://" + re.sub("[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-") + f"-{next(_numbers)}")
    url.emulator = _emulator
    _emulator.make_bucket(url.removeprefix("gs://"))
    yield url
    _emulator.control(faults=[], delay=0.0)
