"""The commands as functions, for notebooks and other Python programs: train, load, evaluate and inspect.

    import trainer
    result = trainer.train(data_dir="pictures", job_dir="job", epochs=5)
    result.metrics["val_accuracy"], result.report, result.classifier.predict("photo.jpg")
    trainer.load("job/saved_model").predict(["photo.jpg", "holiday/"])

Arguments are the flags of the command by their names (`python -m trainer.task --help`), with the same values and checks. An
error that the caller can correct is a trainer.UserError with the words of the command; nothing exits the process.

The program that calls a function stays as it was: its handlers of signals, environment, current directory, flags of absl,
random numbers, Keras' dtype policy and seeds. Progress is logged to standard error, or nothing but warnings with quiet=True.
A program that itself shows the INFO lines of the logger "absl" receives them there. Functions may be called from any thread;
calls in several threads run one after another. For 10,000 files or more, and for tfds:, child processes import the main
module again, so that a script needs its `if __name__ == "__main__":`.
"""

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import functools
import html
import io
import logging as python_logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from absl import logging
from PIL import Image, ImageOps

import trainer.evaluate as evaluate_command
from trainer import cli, config, inspect_data, recipes, task
from trainer.artifacts import run_record
from trainer.artifacts.job_dir import PAGE_NAME, JobDir
from trainer.config import Config
from trainer.errors import UserError
from trainer.inspect_data import Problem
from trainer.runtime.signals import StopRequest
from trainer.serving import batch
from trainer.serving import classifier as classifiers
from trainer.storage import files
from trainer.training.interruption import TrainingInterrupted

# An image: the path of a file (local or gs://), the contents of one, an array uint8 [height, width, 3], or one of Pillow.
ImageLike = str | os.PathLike | bytes | np.ndarray | Image.Image
T = TypeVar("T")

REPORT_HEIGHT = 720  # pixels, in a notebook
COMMAND_FLAGS = ("dry_run", "log_format", "verbosity")  # of trainer.task, without a meaning here

_one_at_a_time = threading.RLock()  # held by train, evaluate and inspect


@dataclasses.dataclass(frozen=True)
class Report:
    """A page that shows itself at the end of a notebook cell. `path` is empty if the page was not written to a file."""

    path: str
    page: str = dataclasses.field(repr=False)  # HTML, with its images inside

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.page)}" width="100%" height="{REPORT_HEIGHT}" '
            'style="border: 1px solid #ccc"></iframe>'
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a classifier says of an image; `error`, if there is one, says why the image cannot be read."""

    path: str  # empty for an image that is not a file
    label: str  # of the most probable class; empty if there is an error
    probability: float
    probabilities: dict[str, float] = dataclasses.field(repr=False)
    novelty: float | None = None  # how unlike the training images it is; None if the model does not say
    is_novel: bool | None = None  # whether it is likely to be of none of the classes
    error: str = ""


class Classifier:
    """A trained model. `class_names` has the classes in the order of the model's outputs."""

    def __init__(self, model: classifiers.Classifier):
        self._model = model
        self.class_names: tuple[str, ...] = model.class_names

    def __repr__(self) -> str:
        return f"Classifier(class_names={self.class_names!r})"

    def predict(self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 32) -> list[Prediction]:
        """A Prediction for each image, in order; of a folder, for each file below it. A bad file does not fail the others.

        Raises UserError for a path that does not exist, or an array that is not uint8 [height, width, 3] or [height, width].
        """
        given: list[Any] = [images] if _is_one_image(images) else list(images)  # type: ignore[arg-type]
        in_memory: dict[str, bytes] = {}
        names: list[str] = []
        for index, image in enumerate(given):
            if isinstance(image, str | os.PathLike):
                names += batch.find_images([os.path.expanduser(os.fspath(image))])
            else:
                names.append(f"\0{index}")  # not the name of any file
                in_memory[names[-1]] = _as_file(image)
        read = functools.partial(_read, in_memory)
        with _guest(quiet=True):
            found = list(batch.predict(self._model, names, batch_size=batch_size, read=read))
        return [self._as_prediction(one) for one in found]

    def _as_prediction(self, one: classifiers.Prediction) -> Prediction:
        path = "" if one.path.startswith("\0") else one.path
        if one.probabilities is None:
            return Prediction(path, "", 0.0, {}, error=one.error)
        index, probability = one.top
        probabilities = dict(zip(self.class_names, one.probabilities.tolist(), strict=True))
        return Prediction(path, self.class_names[index], probability, probabilities, one.novelty, one.is_novel)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training run has left in its job_dir."""

    paths: JobDir  # the path of each file, as in result.paths.split
    model_dir: str
    metrics: dict[str, Any] = dataclasses.field(repr=False)  # metrics.json
    history: list[dict[str, Any]] = dataclasses.field(repr=False)  # the rows of history.csv, one per epoch

    @property
    def report(self) -> Report:
        """The report, which shows itself in a notebook."""
        return _read_report(self.paths.report_page)

    @functools.cached_property
    def classifier(self) -> Classifier:
        """The exported model, loaded when it is used first."""
        return load(self.model_dir)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model achieved on a labeled folder."""

    paths: JobDir  # of the files in report_dir
    metrics: dict[str, Any] = dataclasses.field(repr=False)  # metrics.json

    @property
    def report(self) -> Report:
        """The report, which shows itself in a notebook."""
        return _read_report(files.join(self.paths.root, PAGE_NAME))


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found in a folder of images: `problems` has the kinds of problems, `summary` what inspect.json has."""

    problems: list[Problem]
    summary: dict[str, Any] = dataclasses.field(repr=False)
    report: Report = dataclasses.field(repr=False)


def train(
    data_dir: str | os.PathLike = "",
    job_dir: str | os.PathLike = "",
    *,
    on_epoch: Callable[[dict[str, Any]], None] | str | None = None,
    quiet: bool = False,
    **flag_values: Any,
) -> Result:
    """Trains a classifier on a folder of images and exports it, as trainer.task does, on the devices of this machine.

    `on_epoch` is called with each epoch's row of history.csv when its files are written; what it raises ends the run, which
    is saved, and is raised here. A text is the command of --on_epoch. Called again with the same arguments, an interrupted
    run resumes, and a finished one returns its result. After KeyboardInterrupt the run is saved before it is raised; a second
    one does not wait. Raises UserError, TimeoutError of a bucket, and MemoryError's advice as UserError.
    """
    return _train(data_dir, job_dir, on_epoch=on_epoch, quiet=quiet, flag_values=flag_values)


def _train(
    data_dir: str | os.PathLike,
    job_dir: str | os.PathLike,
    *,
    on_epoch: Callable[[dict[str, Any]], None] | str | None,
    quiet: bool,
    flag_values: dict[str, Any],
    build_network: Callable | None = None,
) -> Result:
    """As train; `build_network` replaces models.networks.build."""
    if isinstance(on_epoch, str):
        flag_values, on_epoch = {**flag_values, "on_epoch": on_epoch}, None
    elif on_epoch is not None and not callable(on_epoch):
        raise UserError(
            f"on_epoch is a {type(on_epoch).__name__}, expected a function of one row, or a command as text."
        )
    settings = _settings({"data_dir": data_dir, "job_dir": job_dir, **flag_values})
    stop = _Stop()
    lock_lost = UserError(f"Another job has taken {settings.job_dir}: wait until it ends, or pass another --job_dir.")
    host = task.Host(
        environment={},  # of a cluster or a tuner, which start commands
        make_stop=lambda: stop,
        on_lock_lost=functools.partial(stop.set_for, lock_lost),
        started_at=time.time(),
        on_epoch=None if on_epoch is None else functools.partial(_call_on_epoch, on_epoch, stop),
    )

    def run() -> None:
        with _one_at_a_time:
            task.prepare_and_run(settings, host, build_network=build_network)

    try:
        _in_own_thread(run, quiet=quiet, stop=stop)
    except TrainingInterrupted:
        if stop.error is None:
            raise
    if stop.error is not None:
        raise stop.error
    paths = JobDir(settings.job_dir)
    metrics = paths.read_metrics()
    if metrics is None:
        raise UserError(f"The run in {paths.root} has reached --max_cost before its first epoch ended: raise it.")
    return Result(paths, settings.model_dir, metrics, run_record.read(paths.root).history)


def _settings(given: dict[str, Any]) -> Config:
    """The configuration of a run from the flags that are given. Raises UserError."""
    for name in COMMAND_FLAGS:
        if name in given:
            raise UserError(
                f"--{name} is for the command trainer.task: leave it out, or pass quiet=True for less output."
            )
    parsed = cli.parse(config.define_flags, given)
    values = cli.flag_values([name for name in config.DEFAULTS if name in parsed], parsed)
    return task.with_environment(Config(**recipes.with_recipe(values, given)), {})


class _Stop(StopRequest):
    """A StopRequest with the error to raise when the run has stopped."""

    error: BaseException | None = None

    def set_for(self, error: BaseException) -> None:
        self.error = error
        self.set()


def _call_on_epoch(on_epoch: Callable[[dict[str, Any]], None], stop: _Stop, row: dict[str, Any]) -> None:
    try:
        on_epoch(dict(row))
    except BaseException as error:
        stop.set_for(error)


def load(model_dir: str | os.PathLike) -> Classifier:
    """The model in a saved_model folder or in the job_dir of a run, local or gs://. Raises UserError if it cannot be loaded."""
    path = os.path.expanduser(os.fspath(model_dir)).rstrip("/")
    classifiers.check_model_dir(path)

    def load_model() -> classifiers.Classifier:
        cli.import_tensorflow()
        return classifiers.load(path)

    return Classifier(_in_own_thread(load_model, quiet=True))


def evaluate(
    model_dir: str | os.PathLike,
    data_dir: str | os.PathLike = "",
    *,
    report_dir: str | os.PathLike,
    quiet: bool = False,
    **flag_values: Any,
) -> Evaluation:
    """Evaluates a model on a labeled folder and writes the report into `report_dir`, as trainer.evaluate does.

    Raises UserError.
    """
    given = {"model_dir": model_dir, "data_dir": data_dir, "report_dir": report_dir, **flag_values}
    parsed = cli.parse(evaluate_command.define_flags, given)
    if "," in parsed.model_dir:
        raise UserError(f"--model_dir={parsed.model_dir} names several models: call evaluate for each of them.")
    with _one_at_a_time, _guest(quiet=quiet):
        evaluate_command.run(parsed)
    paths = JobDir(parsed.report_dir)
    return Evaluation(paths, paths.read_metrics() or {})


def inspect(data_dir: str | os.PathLike = "", *, quiet: bool = False, **flag_values: Any) -> Inspection:
    """Inspects every image of a folder, as trainer.inspect_data does. Writes files only if output_dir or fix is passed.

    Raises UserError.
    """
    parsed = cli.parse(inspect_data.define_flags, {"data_dir": data_dir, "output_dir": "", **flag_values})
    with _one_at_a_time, _guest(quiet=quiet):
        found = inspect_data.run(parsed)
    path = files.join(parsed.output_dir, "inspect.html") if parsed.output_dir else ""
    return Inspection(found.problems, found.summary, Report(path, found.page))


def _in_own_thread(function: Callable[[], T], *, quiet: bool, stop: StopRequest | None = None) -> T:
    """What the function returns. Keras keeps its dtype policy, its seed and the names of layers for each thread.

    This thread only waits, so that KeyboardInterrupt comes here, wherever TensorFlow is; it sets `stop`.
    """

    def call() -> T:
        with _guest(quiet=quiet):
            return function()

    pool = concurrent.futures.ThreadPoolExecutor(1, "trainer")
    future = pool.submit(
        contextvars.copy_context().run, call
    )  # the context tells a notebook which cell the output is of
    pool.shutdown(wait=False)
    try:
        return future.result()
    except KeyboardInterrupt:
        if stop is None or future.done():
            raise
        logging.warning("Interrupted: saving, then stopping. A second interrupt does not wait.")
        stop.set()
        with contextlib.suppress(TrainingInterrupted):
            future.result()
        raise KeyboardInterrupt("The run is saved. The same call resumes it.") from None


class _Visits:
    """How many calls are in progress; the first one changes what TensorFlow and the log need, and the last one restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._changes = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, *, quiet: bool) -> Iterator[None]:
        with self._lock:
            if not self._count:
                self._changes.enter_context(_tensorflow_environment())
                self._changes.enter_context(_log_lines(quiet=quiet))
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._changes.close()


_guest = _Visits()


@contextlib.contextmanager
def _tensorflow_environment() -> Iterator[None]:
    """The variables that TensorFlow reads when it is imported, and when it opens a bucket."""
    added = [name for name in cli.TENSORFLOW_ENVIRONMENT if name not in os.environ]
    os.environ.update({name: cli.TENSORFLOW_ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _log_lines(*, quiet: bool) -> Iterator[None]:
    """Shows the lines of absl's logger on standard error, or warnings alone, and TensorFlow's warnings."""
    logger, root, tensorflow = logging.get_absl_logger(), python_logging.root, python_logging.getLogger("tensorflow")
    levels, propagate = (logger.level, tensorflow.level), logger.propagate
    is_shown_by_host = bool(root.handlers) and logger.isEnabledFor(python_logging.INFO)
    handler, last_resort = python_logging.StreamHandler(), python_logging.lastResort
    handler.setFormatter(cli.Lines())
    # absl would configure a root logger without handlers. This one logs what Python logs without any.
    added_to_root = last_resort if not root.handlers else None
    if added_to_root:
        root.addHandler(added_to_root)
    if not is_shown_by_host:
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(python_logging.WARNING if quiet else python_logging.INFO)
    tensorflow.setLevel(python_logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(levels[0])
        tensorflow.setLevel(levels[1])
        logger.propagate = propagate
        logger.removeHandler(handler)
        if added_to_root:
            root.removeHandler(added_to_root)


def _is_one_image(images: ImageLike | Iterable[ImageLike]) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4  # else a batch
    return isinstance(images, str | os.PathLike | bytes | Image.Image)


def _as_file(image: bytes | np.ndarray | Image.Image) -> bytes:
    """The contents of an image file with these pixels. Raises UserError for what is no image."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        channels = image.shape[2:]
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in ((), (3,)):
            raise UserError(
                f"an image is an array {image.dtype} of shape {image.shape}, expected uint8 [height, width, 3] or "
                "[height, width]: convert it."
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(
            f"an image is a {type(image).__name__}, expected a path, bytes, an array or an image of Pillow."
        )
    file = io.BytesIO()
    ImageOps.exif_transpose(image).convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def _read(in_memory: dict[str, bytes], name: str) -> bytes | None:
    return in_memory[name] if name in in_memory else files.read(name)


def _read_report(path: str) -> Report:
    return Report(path, (files.read(path) or b"").decode())
