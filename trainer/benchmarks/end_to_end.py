"""Suites `accuracy`, `job`, `resume` and `growth`: each measurement is a process, imports included.

`python -c` runs train_article_recipe and read_folder_once of this module in those processes.
"""

import collections
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from trainer.benchmarks.suite import Baseline, Metrics, Suite, Target, one_device, read_usage
from trainer.data import input_pipeline, listing, sampler, splits
from trainer.data.dataset import read_folder
from trainer.data.preprocessing import NetworkInput

ARTICLE_ACCURACY = 0.9649  # validation accuracy of the article
TASK = (sys.executable, "-m", "trainer.task")
# As in deploy/flags/demo.flags: random weights give no features that a head alone can learn from.
RANDOM_WEIGHTS_FLAGS = ("--head_epochs=0", "--epochs=8", "--learning_rate=1e-3", "--batch_size=16", "--optimizer=adam")


class TimedProcess:
    """A child process whose output lines carry the seconds since its start. It is killed after `limit_seconds`."""

    def __init__(self, command: list[str], *, limit_seconds: float = float("inf"), directory: str | None = None):
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory
        )
        self._output: list[str] = []
        self._timer = None
        if limit_seconds != float("inf"):
            self._timer = threading.Timer(limit_seconds, self._process.kill)
            self._timer.start()

    def lines(self) -> Iterator[tuple[float, str]]:
        """Yields (seconds since the start, line) of stdout and stderr until the process exits."""
        assert self._process.stdout
        for line in self._process.stdout:
            self._output.append(line)
            yield time.monotonic() - self._started, line

    def wait_for(self, pattern: str) -> tuple[float, re.Match]:
        """Waits for a line that matches; returns its seconds and the match. Raises RuntimeError if there is none."""
        for seconds, line in self.lines():
            match = re.search(pattern, line)
            if match:
                return seconds, match
        raise RuntimeError(f"the process exited without output {pattern!r}: {self._last_lines()}")

    def peak_mib(self) -> float:
        """Peak resident memory of the process so far; 0 after its exit."""
        try:
            return _peak_memory_mib(str(self._process.pid))
        except (OSError, KeyError):  # no such process, or one that has ended and has no memory
            return 0.0

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process."""
        self._process.send_signal(number)

    def wait(self, *exit_codes: int) -> float:
        """Waits for the exit; returns the seconds since the start. Raises RuntimeError on any other exit code."""
        collections.deque(self.lines(), maxlen=0)  # reads the rest of the output
        self._process.wait()
        if self._timer:
            self._timer.cancel()
        if self._process.returncode not in exit_codes:
            raise RuntimeError(f"exit code {self._process.returncode}: {self._last_lines()}")
        return time.monotonic() - self._started

    def _last_lines(self) -> str:
        return "".join(self._output[-20:])


def python_command(function: Callable[..., None], *arguments: object) -> list[str]:
    """A command that calls a function of a module with the arguments as strings."""
    code = f"import sys; from {function.__module__} import {function.__name__} as f; f(*sys.argv[1:])"
    return [sys.executable, "-c", code, *map(str, arguments)]


def link_images(data_dir: str, directory: str, limit: int) -> str:
    """Links the first `limit` JPEG files of a data directory, evenly over its classes, into `directory`; 0 links all."""
    found = listing.list_files(data_dir)
    per_class = -(-limit // len(found.class_names)) if limit else sys.maxsize
    counts: dict[int, int] = {}
    for path, label in zip(found.paths, found.labels, strict=True):
        if counts.get(label, 0) < per_class and pathlib.Path(path).suffix.lower() in (".jpg", ".jpeg"):
            counts[label] = counts.get(label, 0) + 1
            link_path = os.path.join(directory, found.class_names[label], f"{counts[label]:06d}.jpg")
            link(os.path.join(data_dir, path), link_path)
    return directory


def link(target: str, path: str) -> None:
    """Creates a symbolic link at `path`, and the folder for it, unless the path exists."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.lexists(path):
        os.symlink(os.path.abspath(target), path)


# ---- accuracy


def accuracy_suite(
    folder: str, weights: str, directory: str, *, image_size: int, budget_factor: float, task: tuple[str, ...] = TASK
) -> Suite:
    """The default recipe and the article's recipe in Keras, on the same images, weights and split.

    The article's recipe is killed after `budget_factor` times the seconds that the default recipe took to
    ARTICLE_ACCURACY, or to its end.
    """
    split = splits.split_by_content(read_folder(folder).examples, 0.2)
    split_dir = os.path.join(directory, "split")
    for name, examples in (("train", split.training), ("val", split.validation)):
        for path in examples.paths:
            link(os.path.join(folder, path), os.path.join(split_dir, name, path))
    budgets: list[float] = []  # seconds, one for each round
    rounds = itertools.count()

    def run_default_recipe() -> Metrics:
        job_dir = os.path.join(directory, f"default-{next(rounds)}")
        flags = [
            f"--data_dir={split_dir}",
            f"--job_dir={job_dir}",
            f"--weights={weights}",
            f"--image_size={image_size}",
        ]
        process = TimedProcess([*task, *flags, *(RANDOM_WEIGHTS_FLAGS if weights == "none" else ())])
        metrics = _follow_epochs(process, r"\((?P<correct>\d+) of (?P<total>\d+)\)")  # in the row of an epoch
        metrics["seconds"] = process.wait(0)
        budgets.append(budget_factor * min(metrics["seconds_to_goal"], metrics["seconds"]))
        return metrics

    def run_article_recipe() -> Metrics:
        budget = budgets[-1]
        command = python_command(train_article_recipe, split_dir, weights, image_size)
        process = TimedProcess(command, limit_seconds=budget)
        metrics = _follow_epochs(process, r"val_accuracy=(?P<accuracy>\S+)")
        metrics["seconds"] = process.wait(0, -signal.SIGKILL)
        return within_budget(metrics, budget)

    sizes = f"{len(split.training)} + {len(split.validation)} images of {image_size} pixels"
    target = Target(
        description=f"time to {ARTICLE_ACCURACY:.2%}, article recipe (or its budget) / trainer default recipe",
        metric="seconds_to_goal",
        numerator="article recipe in Keras",
        denominator="trainer default recipe",
        bound=20.0,
    )
    return Suite(
        name="accuracy",
        title=f"time to {ARTICLE_ACCURACY:.2%} on {sizes}",
        metric="seconds_to_goal",
        baselines=[
            Baseline("trainer default recipe", run_default_recipe),
            Baseline("article recipe in Keras", run_article_recipe),
        ],
        targets=[target],
        omitted=[f"the article recipe after {budget_factor:g} times the duration of the trainer default recipe"],
    )


def within_budget(metrics: Metrics, budget: float) -> Metrics:
    """The metrics of a recipe with `budget` seconds; if they ended it, it reaches the goal after them at the earliest.

    The ratio is then a lower bound. A recipe that ended by itself before has not reached the goal: inf.
    """
    was_killed = metrics["seconds"] >= budget
    seconds = min(metrics["seconds_to_goal"], metrics["seconds"]) if was_killed else metrics["seconds_to_goal"]
    return {**metrics, "seconds_to_goal": seconds}


def _follow_epochs(process: TimedProcess, pattern: str) -> Metrics:
    """Reads the validation accuracy of each epoch until the process exits; `seconds_to_goal` inf if not reached.

    `pattern` has either the group `accuracy` or the groups `correct` and `total`.
    """
    best_accuracy, seconds_to_goal = 0.0, float("inf")
    for seconds, line in process.lines():
        match = re.search(pattern, line)
        if match:
            values = {name: float(value) for name, value in match.groupdict().items()}
            accuracy = values["accuracy"] if "accuracy" in values else values["correct"] / values["total"]
            logging.info("%.0f s: validation accuracy %.4f", seconds, accuracy)
            best_accuracy = max(best_accuracy, accuracy)
            if best_accuracy >= ARTICLE_ACCURACY:
                seconds_to_goal = min(seconds_to_goal, seconds)
    return {"seconds_to_goal": seconds_to_goal, "best_val_accuracy": best_accuracy}


def train_article_recipe(split_dir: str, weights: str, image_size: str) -> None:
    """The article's code on `split_dir`/train and `split_dir`/val; prints `val_accuracy=...` after each epoch."""
    size = int(image_size)
    generator = tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255)
    training, validation = (
        generator.flow_from_directory(
            os.path.join(split_dir, side), (size, size), batch_size=32, shuffle=side == "train", seed=0
        )
        for side in ("train", "val")
    )
    backbone = keras.applications.ResNet50(
        weights="imagenet" if weights == "imagenet" else None, include_top=False, input_shape=(size, size, 3)
    )
    if weights not in ("imagenet", "none"):
        backbone.load_weights(weights)
    features = keras.layers.Flatten()(backbone.output)
    outputs = keras.layers.Dense(training.num_classes, activation="softmax")(features)
    network = keras.Model(backbone.input, outputs)
    network.compile(keras.optimizers.Adam(1e-4), "categorical_crossentropy", metrics=["accuracy"])
    print_accuracy = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: print(f"val_accuracy={logs['val_accuracy']:.4f}", flush=True)
    )
    network.fit(training, validation_data=validation, epochs=100, callbacks=[print_accuracy], verbose=0)


# ---- job


def job_suite(
    folder: str,
    weights: str,
    directory: str,
    *,
    image_size: int,
    earlier_checkout: str = "",
    task: tuple[str, ...] = TASK,
) -> Suite:
    """Whole jobs of the default recipe: the first on its images, and one that finds their features in the cache.

    `earlier_checkout` is a folder with an earlier version of this project, which then does the same jobs in turn.
    """
    versions: dict[str, str | None] = {"trainer": None}
    if earlier_checkout:
        versions["earlier"] = os.path.abspath(earlier_checkout)
    baselines = []
    for number, (version, checkout) in enumerate(versions.items()):
        flags = [
            f"--data_dir={os.path.abspath(folder)}",
            f"--job_dir={os.path.join(directory, f'job-{number}')}",
            f"--cache_dir={os.path.join(directory, f'cache-{number}')}",
            f"--weights={os.path.abspath(weights) if os.path.exists(weights) else weights}",
            f"--image_size={image_size}",
        ]
        measure = functools.partial(_run_job, [*task, *flags], checkout)
        caches = [os.path.join(directory, f"{name}-{number}") for name in ("job", "cache")]
        baselines.append(Baseline(f"{version} job", functools.partial(measure, removed=caches)))
        baselines.append(
            Baseline(f"{version} job, features in the cache", functools.partial(measure, removed=caches[:1]))
        )
    targets = [
        Target(
            description=f"CPU time, earlier version / this version, {name}",
            metric="cpu_seconds",
            numerator=f"earlier {name}",
            denominator=f"trainer {name}",
            bound=1.0,
        )
        for name in ("job", "job, features in the cache")
        if earlier_checkout
    ]
    title = f"whole jobs on {len(listing.list_files(folder).paths):,} images of {image_size} pixels"
    return Suite("job", title, "cpu_seconds", baselines, targets)


def _run_job(command: list[str], checkout: str | None, *, removed: list[str]) -> Metrics:
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    start = read_usage()
    process = TimedProcess(command, directory=checkout)
    peak_mib = max((process.peak_mib() for _ in process.lines()), default=0.0)
    seconds = process.wait(0)
    return {"seconds": seconds, "cpu_seconds": read_usage().cpu_seconds - start.cpu_seconds, "peak_mib": peak_mib}


# ---- resume


def resume_suite(folder: str, directory: str, *, image_size: int, task: tuple[str, ...] = TASK) -> Suite:
    """A job on ResNet50 with random weights, stopped with SIGTERM after its first steps, then resumed and stopped."""
    job_dir = os.path.join(directory, "resumed")
    flags = [
        f"--data_dir={folder}",
        f"--job_dir={job_dir}",
        f"--image_size={image_size}",
        "--weights=none",
        "--head_epochs=0",
        "--epochs=50",
        "--batch_size=8",
        "--steps_per_loop=1",
    ]

    def start_and_stop() -> Metrics:
        process = TimedProcess([*task, *flags])
        seconds_to_first_step, _ = process.wait_for(r"First steps done")
        stopped = time.monotonic()
        process.send_signal(signal.SIGTERM)
        seconds = process.wait(143)
        return {
            "seconds_to_first_step": seconds_to_first_step,
            "seconds_to_save_and_exit": time.monotonic() - stopped,
            "seconds": seconds,
        }

    def start_from_scratch() -> Metrics:
        shutil.rmtree(job_dir, ignore_errors=True)
        return start_and_stop()

    baselines = [Baseline("cold start", start_from_scratch), Baseline("resumed", start_and_stop)]
    title = f"job startup and shutdown, ResNet50, {image_size} pixels"
    return Suite("resume", title, "seconds_to_first_step", baselines)


# ---- growth


def growth_suite(folder: str, directory: str, *, sizes: list[int], image_size: int) -> Suite:
    """Listing, checking, splitting and the first batch of folders with `sizes` links to a few images of `folder`."""
    images = [os.path.join(folder, path) for path in listing.list_files(folder).paths]

    def measure(size: int) -> Metrics:
        grown_dir = os.path.join(directory, f"grown-{size}")
        if not os.path.isdir(grown_dir):
            for i, target in zip(range(size), itertools.cycle(images[:50] + images[-50:])):
                link(target, os.path.join(grown_dir, "ab"[i % 2], f"{i}.jpg"))
        process = TimedProcess(python_command(read_folder_once, grown_dir, image_size))
        _, match = process.wait_for(r"^metrics (.*)")
        metrics = json.loads(match[1])
        metrics["seconds"] = process.wait(0)
        metrics["milliseconds_per_image"] = 1000 * metrics["list_and_split_seconds"] / size
        return metrics

    smallest, largest = f"{sizes[0]:,} images", f"{sizes[-1]:,} images"
    memory_target = Target(
        description=f"peak memory, {largest} / {smallest}",
        metric="peak_mib",
        numerator=largest,
        denominator=smallest,
        bound=1.2,
        at_least=False,
    )
    return Suite(
        name="growth",
        title="growing folders",
        metric="list_and_split_seconds",
        baselines=[Baseline(f"{size:,} images", functools.partial(measure, size)) for size in sizes],
        targets=[memory_target],
    )


def read_folder_once(folder: str, image_size: str) -> None:
    """Reads and splits a folder, makes the first batch, and prints the metrics as JSON."""
    started = time.monotonic()
    training = splits.split_by_content(read_folder(folder).examples, 0.2).training
    split_done = time.monotonic()
    plan = sampler.shuffled_epoch(
        training.labels,
        seed=0,
        epoch=0,
        batch_size=32,
        replicas=1,
        class_weights=np.ones(training.labels.max() + 1, np.float32),
    )
    transform = input_pipeline.BatchTransform(preprocessing="caffe", augmentation=None, dtype="float32")
    source = input_pipeline.FileSource(
        directory=folder,
        paths=training.paths,
        network_input=NetworkInput(int(image_size), "stretch", transform.preprocessing),
        on_unreadable=lambda index: None,
    )
    batches = input_pipeline.batches(plan, source, training.labels, transform=transform, devices=one_device())
    next(iter(batches))
    metrics = {
        "list_and_split_seconds": split_done - started,
        "first_batch_seconds": time.monotonic() - split_done,
        "peak_mib": _peak_memory_mib(),
    }
    print("metrics", json.dumps(metrics), flush=True)


def _peak_memory_mib(process_id: str = "self") -> float:
    """Peak resident memory of a process. ru_maxrss does not serve: a process inherits it from its parent."""
    status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{process_id}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024
