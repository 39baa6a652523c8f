"""Tunes flags of trainer.task on this machine: runs one trial after another and keeps the best values.

    python -m trainer.tune --data_dir=pictures --job_dir=study --trials=20
        tunes the training of the head on ImageNet features, which the trials share: seconds per trial
    python -m trainer.tune --data_dir=pictures --job_dir=study --trials=20 --epochs=3 --tune=learning_rate,dropout
        tunes two flags, with three epochs of fine-tuning in each trial

Other flags of trainer.task apply to every trial. A trial is pruned if it is worse than the median trial at the same epoch.
The same command resumes an interrupted study, including its interrupted trial. Files in the folder of the study: study.log
(the journal of Optuna), trials.csv, tuning.png, trials/NNN (one job_dir per trial), and best.flags for --flagfile.
Exit codes: 0 done; 2 you must change something; 143 stopped by a signal, start it again.
"""

import csv
import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from absl import flags, logging

from trainer import cli, config, recipes
from trainer.artifacts.job_dir import JobDir
from trainer.config import Config
from trainer.errors import UserError
from trainer.reporting import tuning_plot
from trainer.storage import files, lock


class FloatRange(NamedTuple):
    """The values that a flag may take, both bounds included."""

    lowest: float
    highest: float
    is_logarithmic: bool


# Flag -> its range, or the values to choose from. The studies in deploy/ have the same search space.
SPACE: dict[str, FloatRange | tuple[int, ...]] = {
    "head_learning_rate": FloatRange(1e-4, 1e-2, is_logarithmic=True),
    "learning_rate": FloatRange(1e-4, 1e-2, is_logarithmic=True),
    "dropout": FloatRange(0.0, 0.5, is_logarithmic=False),
    "label_smoothing": FloatRange(0.0, 0.2, is_logarithmic=False),
    "batch_size": (16, 32, 64),
}
STARTUP_TRIALS = 5  # drawn at random and never pruned; later trials are compared with them
EPOCHS_BEFORE_PRUNING = 2  # of each trial, because the first epochs predict little
HEAD_EPOCHS = 15  # of each trial that trains the head alone: a fitted head (--head_epochs=-1) has nothing to tune
MAX_FAILURES = 3  # in a row
POLL_SECONDS = 0.5
TRIAL_COMMAND = (sys.executable, "-m", "trainer.task")
PATH_FLAGS = {
    "data_dir",
    "job_dir",
    "cache_dir",
    "model_dir",
    "tensorboard_dir",
}  # which each trial gets from the study


@dataclasses.dataclass(frozen=True)
class StudyDir:
    """The paths in the folder of a study."""

    root: str

    def _path(self, name: str) -> str:
        return files.join(self.root, name)

    @property
    def journal(self) -> str:
        """Every trial with its values and metrics, as Optuna stores them."""
        return self._path("study.log")

    @property
    def results(self) -> str:
        """One row per trial that is complete or pruned."""
        return self._path("trials.csv")

    @property
    def plot(self) -> str:
        """The validation accuracy over the trials and over each tuned flag."""
        return self._path("tuning.png")

    @property
    def best_flags(self) -> str:
        """The flags of the best trial, for --flagfile."""
        return self._path("best.flags")

    @property
    def best_job(self) -> str:
        """The job_dir of a job with the best values, in the command that is printed; the study does not create it."""
        return self._path("best")

    @property
    def features(self) -> str:
        """The cache_dir that all trials share."""
        return self._path("features")

    @property
    def trials(self) -> str:
        """Folder of the job_dirs of the trials, and of their logs and metrics."""
        return self._path("trials")

    def trial(self, number: int) -> str:
        """The job_dir of a trial."""
        return files.join(self.trials, f"{number:03d}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a trial: its optuna.trial.TrialState and, if complete, its best validation accuracy."""

    state: Any
    val_accuracy: float | None = None
    val_loss: float = 0.0
    error: str = ""  # the last line of a failed trial


def define_flags() -> None:
    """Defines the flags of trainer.task and those of the study."""
    config.define_flags(flags.FLAGS)
    flags.adopt_module_key_flags(config)
    flags.DEFINE_integer("trials", 20, "Number of trials of the study, earlier ones included.", lower_bound=1)
    flags.DEFINE_list(
        "tune", [], f"Flags to tune, of {', '.join(SPACE)}. Default: those that have an effect and are not set."
    )


def main(arguments: list[str]) -> int:
    """Runs the study that the flags describe; returns its exit code."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --name=value.")
    cli.require("data_dir", "job_dir")
    settings, given = _settings(cli.flag_values(config.DEFAULTS), cli.given_flags(config.DEFAULTS))
    study_dir = StudyDir(settings.job_dir.rstrip("/"))
    if files.is_remote(study_dir.root):
        raise UserError(
            f"--job_dir={study_dir.root}: a study on this machine needs a local folder. See deploy/ for clusters."
        )
    names = _names_to_tune(flags.FLAGS.tune, settings, given)
    values = settings.as_dict()
    fixed = {name: values[name] for name in values if name in given and name not in PATH_FLAGS and name not in names}
    files.make_directory(study_dir.trials)
    files.check_links(study_dir.root)
    with lock.hold(study_dir.root):
        return Tuner(study_dir, settings.data_dir, names, fixed).run(flags.FLAGS.trials)


def _settings(values: dict[str, Any], given: list[str]) -> tuple[Config, list[str]]:
    """The flags of all trials, and the names of those that are set. Raises UserError before the first trial.

    Trials that do not fine-tune train the head for HEAD_EPOCHS.
    """
    values = recipes.with_recipe(values, given)
    if values["head_epochs"] == -1 and not _is_finetuned(values["epochs"], values["recipe"]):
        values, given = {**values, "head_epochs": HEAD_EPOCHS}, [*given, "head_epochs"]
    return Config(**values), given


def _is_finetuned(epochs: int, recipe: str) -> bool:
    return epochs > 0 or (epochs == -1 and recipe == "finetune")


def _names_to_tune(requested: list[str], settings: Config, given: list[str]) -> list[str]:
    is_finetuned = _is_finetuned(settings.epochs, settings.recipe)
    has_effect = {"head_learning_rate": settings.head_epochs > 0, "learning_rate": is_finetuned}
    without_effect = {name for name, value in has_effect.items() if not value}
    for name in requested:
        if name not in SPACE:
            raise UserError(f"--tune={name}: pass one or more of {', '.join(SPACE)}.")
        if name in without_effect:
            raise UserError(
                f"--tune={name} has no effect with --head_epochs={settings.head_epochs} --epochs={settings.epochs}."
            )
    return requested or [name for name in SPACE if name not in without_effect and name not in given]


class Tuner:
    """A study in one folder: gets values from Optuna, runs a job with them and reports its metrics to Optuna."""

    def __init__(self, study_dir: StudyDir, data_dir: str, names: list[str], fixed: dict[str, Any]):
        """`names` are the flags to tune, `fixed` the values of other flags."""
        optuna = _import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._states = optuna.trial.TrialState
        self._study_dir, self._data_dir, self._fixed = study_dir, data_dir, fixed
        self._distributions = {name: _distribution(name) for name in names}
        self._study = optuna.create_study(
            storage=_open_journal(study_dir.journal),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=EPOCHS_BEFORE_PRUNING),
            study_name="trainer",
            direction="maximize",
            load_if_exists=True,
        )
        self._check_same_study({"data_dir": data_dir, "tune": names, "flags": fixed})
        self._job: subprocess.Popen | None = None
        self._is_stopped = False

    def _check_same_study(self, description: dict[str, Any]) -> None:
        previous = self._study.user_attrs.get("study")
        if previous is None:
            self._study.set_user_attr("study", description)
        elif previous != json.loads(json.dumps(description)):
            raise UserError(
                f"{self._study_dir.root} holds a study of {json.dumps(previous)}, not of {json.dumps(description)}: pass "
                "another --job_dir, or those flags."
            )

    def run(self, num_trials: int) -> int:
        """Runs trials until `num_trials` are complete or pruned; returns the exit code."""
        from tqdm import tqdm

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._requeue_interrupted()
        if self._ended():  # the last start may have been killed before it wrote them
            self._write_results()
        failures = 0
        with tqdm(total=num_trials, initial=len(self._ended()), unit="trial", disable=not sys.stderr.isatty()) as bar:

            def show(activity: str) -> None:
                bar.n = len(self._ended())
                best = f", best val_accuracy {self._study.best_value:.4f}" if bar.n else ""
                bar.set_postfix_str(f"{activity}{best}")  # draws the bar with the time of now

            while len(self._ended()) < num_trials and not self._is_stopped:
                self._study.sampler = self._make_sampler()
                trial = self._study.ask(self._distributions)
                outcome = self._run_trial(trial, show)
                if self._is_stopped:
                    break  # the trial stays open in the journal, and the next start resumes it
                with tqdm.external_write_mode(sys.stderr):
                    self._record(trial, outcome)
                failures = failures + 1 if outcome.state == self._states.FAIL else 0
                if failures == MAX_FAILURES or (failures and not self._ended()):
                    raise UserError(
                        f"Trial {trial.number} failed: {outcome.error or 'it wrote nothing'} (see {self._log_path(trial)})"
                    )
        if self._is_stopped:
            logging.warning("Stopped. The same command resumes the study.")
            return cli.EXIT_STOPPED
        self._print_best()
        return 0

    def _make_sampler(self) -> Any:
        """A sampler for the next trial.

        Its seed counts the trials: a study that is started again would otherwise draw its first values again.
        """
        optuna = _import_optuna()
        seed = self._fixed.get("seed", 0) + len(self._study.get_trials(deepcopy=False))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_stopped = True
        if self._job:
            self._job.send_signal(signal.SIGTERM)  # the job writes a checkpoint, from which the next start resumes it

    def _requeue_interrupted(self) -> None:
        """Queues the trials that an interrupted study left open, each with its values and its job_dir."""
        for trial in self._study.get_trials(states=[self._states.RUNNING]):
            self._study.enqueue_trial(trial.params, user_attrs={"folder": self._job_dir(trial)})
            self._study.tell(trial.number, state=self._states.FAIL)

    def _ended(self) -> list:
        """The trials that are complete or pruned."""
        return self._study.get_trials(deepcopy=False, states=[self._states.COMPLETE, self._states.PRUNED])

    def _job_dir(self, trial: Any) -> str:
        return trial.user_attrs.get("folder", self._study_dir.trial(trial.number))

    def _log_path(self, trial: Any) -> str:
        return f"{self._job_dir(trial)}.log"

    def _run_trial(self, trial: Any, show: Callable[[str], None]) -> Outcome:
        """Runs the job of a trial to its end, or to the epoch at which it is pruned. `show` gets what it is doing."""
        values = {
            "data_dir": self._data_dir,
            "job_dir": self._job_dir(trial),
            "cache_dir": self._study_dir.features,
            **self._fixed,
            **trial.params,
        }
        metrics_path = f"{self._job_dir(trial)}.metrics"
        with open(self._log_path(trial), "ab") as log:
            self._job = subprocess.Popen(
                [*TRIAL_COMMAND, *_as_arguments(values)],
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that Ctrl-C stops the study alone, which stops the trial once
                env={**os.environ, "CLOUD_ML_HP_METRIC_FILE": metrics_path},
            )
        is_pruned, num_reported = False, 0
        while self._job.poll() is None:
            time.sleep(POLL_SECONDS)
            for epoch, accuracy in _read_metrics(metrics_path)[num_reported:]:
                num_reported += 1
                trial.report(accuracy, epoch)
                if trial.should_prune() and not is_pruned:
                    is_pruned = True
                    self._job.send_signal(signal.SIGTERM)
            show(f"trial {trial.number}, epoch {num_reported + 1}")
        metrics = JobDir(self._job_dir(trial)).read_metrics()
        if metrics:
            return Outcome(self._states.COMPLETE, metrics["val_accuracy"], metrics["val_loss"])
        if is_pruned and self._job.returncode == cli.EXIT_STOPPED:
            return Outcome(self._states.PRUNED)
        return Outcome(self._states.FAIL, error=_last_line(self._log_path(trial)))

    def _best_trial(self) -> Any:
        """The complete trial with the highest validation accuracy; of equal ones, that with the lowest loss."""
        complete = self._study.get_trials(deepcopy=False, states=[self._states.COMPLETE])
        return max(complete, key=lambda trial: (trial.value, -trial.user_attrs.get("val_loss", float("inf"))))

    def _record(self, trial: Any, outcome: Outcome) -> None:
        trial.set_user_attr("val_loss", outcome.val_loss)
        self._study.tell(trial, outcome.val_accuracy, state=outcome.state)
        values = ", ".join(f"{name} {value:.4g}" for name, value in trial.params.items())
        is_complete = outcome.val_accuracy is not None
        result = f"val_accuracy {outcome.val_accuracy:.4f}" if is_complete else outcome.state.name.lower()
        logging.info("trial %d: %s with %s", trial.number, result, values)
        if self._ended():
            self._write_results()

    def _write_results(self) -> None:
        names, trials = list(self._distributions), self._ended()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", "state", "val_accuracy", "epochs", *names, "job_dir"])
        for trial in trials:
            values = [trial.params[name] for name in names]
            accuracy = max([trial.value or 0, *trial.intermediate_values.values()])
            epochs = len(trial.intermediate_values)
            writer.writerow([trial.number, trial.state.name, f"{accuracy:.6g}", epochs, *values, self._job_dir(trial)])
        files.atomic_write(self._study_dir.results, text.getvalue())
        if any(trial.state == self._states.COMPLETE for trial in trials):
            best = {**self._fixed, **self._best_trial().params}
            files.atomic_write(self._study_dir.best_flags, "".join(f"{word}\n" for word in _as_arguments(best)))
            scales = {name: _axis_scale(name) for name in names}
            tuning_plot.write(self._study_dir.plot, trials, names, scales)

    def _print_best(self) -> None:
        best = self._best_trial()
        arguments = [
            f"--flagfile={self._study_dir.best_flags}",
            f"--data_dir={self._data_dir}",
            f"--job_dir={self._study_dir.best_job}",
        ]
        lines = [
            f"best val_accuracy {best.value:.4f} (trial {best.number} of {len(self._ended())})",
            f"plot:  {self._study_dir.plot}",
            f"model: {JobDir(self._job_dir(best)).saved_model}",
            f"train with it: {cli.command('task')} {shlex.join(arguments)}",
        ]
        print("\n".join(lines), flush=True)


def _import_optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna is not installed: pip install optuna.") from None
    return optuna


def _open_journal(path: str) -> Any:
    """The storage of a study. Raises UserError if the file is damaged, other than by a kill in its last line."""
    storages = _import_optuna().storages
    try:
        return storages.JournalStorage(storages.journal.JournalFileBackend(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or pass another --job_dir.") from None


def _distribution(name: str) -> Any:
    distributions, space = _import_optuna().distributions, SPACE[name]
    if isinstance(space, FloatRange):
        return distributions.FloatDistribution(space.lowest, space.highest, log=space.is_logarithmic)
    return distributions.CategoricalDistribution(space)


def _axis_scale(name: str) -> str:
    space = SPACE[name]
    return "log" if isinstance(space, FloatRange) and space.is_logarithmic else "linear"


def _as_arguments(values: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def _read_metrics(path: str) -> list[tuple[int, float]]:
    """(epoch, val_accuracy) of each epoch that a trial has reported. The trial may be writing the last line."""
    contents = files.read(path) or b""
    rows = []
    for line in contents.decode().splitlines(keepends=True):
        if line.endswith("\n") and "val_accuracy" in (row := json.loads(line)):
            rows.append((int(row["global_step"]), float(row["val_accuracy"])))
    return rows


def _last_line(path: str) -> str:
    """The line of a log that starts with `error:`, else the last line that is not empty."""
    lines = (files.read(path) or b"").decode(errors="replace").split("\n")
    errors = [line for line in lines if line.startswith("error:")]
    filled = [line for line in lines if line]
    return errors[0] if errors else filled[-1] if filled else ""


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
