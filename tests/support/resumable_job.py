"""A job of tiny_job.py whose run has every kind of state, as a process, and what such a run leaves. Not a test itself."""

import csv
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import h5py
import numpy as np

from tests.support.paths import TINY_JOB
from trainer.artifacts.job_dir import JobDir

# Both stages, dropout, augmentation, a schedule with warm-up, label smoothing, class weights, early stopping.
FLAGS = ["--image_size=32", "--batch_size=8", "--head_epochs=8", "--epochs=14", "--learning_rate=3e-3",
         "--head_learning_rate=0.02", "--dropout=0.3", "--label_smoothing=0.1", "--warmup_epochs=1", "--precision=float32",
         "--preprocessing=rescale", "--early_stopping_patience=10", "--class_weight=balanced", "--steps_per_loop=1",
         "--checkpoint_secs=1"]  # fmt: skip

# In place of the head's epochs: its optimum, the default of trainer.task.
FITTED_HEAD = ["--head_epochs=-1", "--head_learning_rate=0.001"]


def start(
    images: pathlib.Path, job_dir: pathlib.Path, *more: str, prefix: Sequence[str] = (), **options
) -> subprocess.Popen:
    """Starts the job with FLAGS and `more` flags, by the command `prefix`; `options` are those of Popen."""
    weights = images.parent / "given.weights.h5"
    weights.write_bytes(b"")  # tiny_job.py does not load it, but its content is part of the name of the features
    flags = [f"--data_dir={images}", f"--job_dir={job_dir}", f"--weights={weights}", *FLAGS, *more]
    return subprocess.Popen(
        [*prefix, sys.executable, TINY_JOB, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Waits for a line that contains `text`; returns the output up to that line."""
    output = ""
    while text not in output:
        line = process.stdout.readline()
        assert line, f"exited without {text!r}:\n{output}"
        output += line
    return output


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """Waits for the exit; returns the rest of the output."""
    output, _ = process.communicate(timeout=timeout)
    return output


def run(images: pathlib.Path, job_dir: pathlib.Path, *more: str) -> str:
    """Runs the job to its end; returns its output."""
    process = start(images, job_dir, *more)
    output = finish(process)
    assert process.returncode == 0, output
    return output


def newest_checkpoint(job_dir: pathlib.Path) -> pathlib.Path:
    """The path of the newest checkpoint."""
    paths = JobDir(str(job_dir))
    return pathlib.Path(paths.checkpoint(paths.checkpoint_numbers()[-1]))


def read_rows(path: str) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_result(job_dir: pathlib.Path) -> dict:
    """Everything that a run leaves except times: weights as arrays, the rest as values."""
    paths = JobDir(str(job_dir))
    metrics = json.loads(pathlib.Path(paths.metrics).read_text())
    for name in ("seconds", "images_per_second"):
        metrics.pop(name)
    history = read_rows(paths.history)
    for row in history:
        for name in ("seconds", "images_per_second"):
            row.pop(name)
    weights = {}
    with h5py.File(paths.best_weights) as file:
        file.visititems(lambda name, item: weights.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    with np.load(newest_checkpoint(job_dir)) as archive:
        checkpoint = {name: archive[name] for name in archive.files if name != "state.json"}
    predictions = pathlib.Path(paths.predictions).read_text()
    return {
        "metrics": metrics,
        "history": history,
        "predictions": predictions,
        "weights": weights,
        "checkpoint": checkpoint,
    }


def assert_same(one: dict, other: dict) -> None:
    """Asserts that two results of read_result are bit-identical."""
    for name in ("history", "metrics", "predictions"):
        assert one[name] == other[name]
    for kind in ("weights", "checkpoint"):
        assert one[kind].keys() == other[kind].keys()
        for name, value in one[kind].items():
            np.testing.assert_array_equal(value, other[kind][name], err_msg=f"{kind} {name}")
