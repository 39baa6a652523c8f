"""Tries values of the trainer's flags on this machine, one job after another, and keeps the best.

    python -m trainer.tune --data_dir=pictures --job_dir=study --trials=20
        a head on ImageNet features, which the trials share: seconds each
    python -m trainer.tune --data_dir=pictures --job_dir=study --trials=20 --epochs=3 --tune=learning_rate,dropout
        two flags alone, with three epochs of the whole network

Every other flag of trainer.task goes to each trial as it is. A trial that is worse than most at the same epoch is ended
early. Started again with the same flags, a study goes on where it was, its interrupted trial too. It leaves study.log
(Optuna's journal), trials.csv, tuning.png, trials/NNN (the job_dir of each) and best.flags, for --flagfile.
Exit codes: 0 done; 2 you must change something; 143 stopped by a signal, start it again.
"""

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from absl import flags, logging

from trainer import cli, config
from trainer.artifacts.job_dir import JobDir
from trainer.errors import UserError
from trainer.reporting import plots
from trainer.storage import files, lock

# Flag -> (lowest, highest, whether on a logarithmic scale), or the values to choose from. deploy/ tunes the same.
SPACE: dict[str, tuple] = {
    "head_learning_rate": (1e-4, 1e-2, True),
    "learning_rate": (1e-6, 1e-4, True),
    "dropout": (0.0, 0.5, False),
    "label_smoothing": (0.0, 0.2, False),
    "batch_size": (16, 32, 64),
}


CHOICES = {"batch_size"}


SCALES = {name: "log" if name not in CHOICES and space[2] else "linear" for name, space in SPACE.items()}


STARTUP_TRIALS = 5  # that are drawn at random and never ended early: what the others are judged by


EPOCHS_WITHOUT_JUDGEMENT = 2  # of every trial: the first ones say little


MAX_FAILURES = 3  # in a row


SECONDS_BETWEEN_LOOKS = 0.5


PROGRAM = (sys.executable, "-m", "trainer.task")


OWN_FLAGS = {"trials", "tune", "job_dir", "data_dir", "cache_dir", "model_dir", "tensorboard_dir", "flagfile"}


class Outcome(NamedTuple):
    """How a trial ended: Optuna's name of the state, and the best validation accuracy that it reached."""

    state: str
    val_accuracy: float | None
    said: str = ""  # the last line of a trial that failed


def define_flags() -> None:
    """Those of trainer.task, and how much to try."""
    config.define_flags()
    flags.adopt_module_key_flags(config)
    flags.DEFINE_integer("trials", 20, "How many trials the study has in the end.", lower_bound=1)
    flags.DEFINE_list(
        "tune", [], f"The flags to try values of: {', '.join(SPACE)}. Default: those that have an effect."
    )


def main(arguments: list[str]) -> int:
    """Runs the study that the flags describe; returns its exit code."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --name=value.")
    cli.require("data_dir", "job_dir")
    values = flags.FLAGS
    directory = values.job_dir.rstrip("/")
    if files.is_remote(directory):
        raise UserError(
            f"--job_dir={directory}: a study of this machine needs a local folder; see deploy/ for clusters."
        )
    given = {name: values[name].value for name in config.DEFAULTS if values[name].present and name not in OWN_FLAGS}
    names = _names_to_tune(values.tune, given, head_epochs=values.head_epochs, epochs=values.epochs)
    fixed = {name: value for name, value in given.items() if name not in names}
    os.makedirs(f"{directory}/trials", exist_ok=True)
    with lock.hold(directory):
        return Tuner(directory, values.data_dir, names, fixed).run(values.trials)


def _names_to_tune(asked: list[str], given: dict, *, head_epochs: int, epochs: int) -> list[str]:
    epochs_of = {"head_learning_rate": head_epochs, "learning_rate": epochs}
    without_effect = {name for name, count in epochs_of.items() if not count}
    for name in asked:
        if name not in SPACE:
            raise UserError(f"--tune={name}: pass some of {', '.join(SPACE)}.")
        if name in without_effect:
            raise UserError(f"--tune={name} has no effect with --head_epochs={head_epochs} --epochs={epochs}.")
    return asked or [name for name in SPACE if name not in without_effect and name not in given]


class Tuner:
    """One study in one folder: asks Optuna for values, runs a job with them, tells what came out."""

    def __init__(self, directory: str, data_dir: str, names: list[str], fixed: dict):
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._directory, self._data_dir, self._fixed = directory, data_dir, fixed
        self._distributions = {name: _distribution(name) for name in names}
        backend = optuna.storages.journal.JournalFileBackend(f"{directory}/study.log")
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            sampler=optuna.samplers.TPESampler(seed=fixed.get("seed", 0), n_startup_trials=STARTUP_TRIALS),
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=STARTUP_TRIALS, n_warmup_steps=EPOCHS_WITHOUT_JUDGEMENT
            ),
            study_name="trainer",
            direction="maximize",
            load_if_exists=True,
        )
        self._check_same_study({"data_dir": data_dir, "tune": names, "flags": fixed})
        self._job: subprocess.Popen | None = None
        self._is_stopped = False

    def _check_same_study(self, now: dict) -> None:
        before = self._study.user_attrs.get("study")
        if before is None:
            self._study.set_user_attr("study", now)
        elif before != json.loads(json.dumps(now)):
            raise UserError(
                f"{self._directory} holds a study of {json.dumps(before)}, not of {json.dumps(now)}: pass another --job_dir, "
                "or those flags."
            )

    def run(self, trials: int) -> int:
        """Goes on until so many trials are done; returns the exit code."""
        from tqdm import tqdm

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._resume_interrupted()
        failures = 0
        with tqdm(total=trials, initial=len(self._done()), unit="trial", disable=not sys.stderr.isatty()) as bar:
            while len(self._done()) < trials and not self._is_stopped:
                trial = self._study.ask(self._distributions)
                outcome = self._run_trial(trial)
                if self._is_stopped:
                    break  # the trial stays open in study.log, to be taken up again
                self._record(trial, outcome)
                failures = failures + 1 if outcome.state == "FAIL" else 0
                if failures == MAX_FAILURES or (failures and not self._done()):
                    raise UserError(
                        f"Trial {trial.number} ended with: {outcome.said or 'nothing'} (see {self._folder(trial)}.log)"
                    )
                bar.n = len(self._done())
                bar.set_postfix_str(f"best val_accuracy {self._study.best_value:.4f}" if self._done() else "")
        if self._is_stopped:
            logging.warning("Stopped. The same command goes on from here.")
            return cli.EXIT_STOPPED
        self._print_best()
        return 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_stopped = True
        if self._job:
            self._job.send_signal(signal.SIGTERM)  # it saves, and so goes on from there the next time

    def _resume_interrupted(self) -> None:
        """Puts what a stopped study left open first in the queue again, with the job_dir that it has."""
        optuna = _optuna()
        for trial in self._study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            self._study.enqueue_trial(trial.params, user_attrs={"folder": self._folder(trial)})
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def _done(self) -> list:
        optuna = _optuna()
        states = [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
        return self._study.get_trials(deepcopy=False, states=states)

    def _folder(self, trial: Any) -> str:
        return trial.user_attrs.get("folder", f"{self._directory}/trials/{trial.number:03d}")

    def _run_trial(self, trial: Any) -> Outcome:
        """Runs the job of a trial to its end, or to the epoch at which it is worse than most."""
        folder = self._folder(trial)
        own = {"data_dir": self._data_dir, "job_dir": folder, "cache_dir": f"{self._directory}/features"}
        words = [f"--{name}={value}" for name, value in {**own, **self._fixed, **trial.params}.items()]
        metrics = f"{folder}.metrics"
        with open(f"{folder}.log", "ab") as log:
            self._job = subprocess.Popen(
                [*PROGRAM, *words],
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the study, which then stops the trial once
                env={**os.environ, "CLOUD_ML_HP_METRIC_FILE": metrics},
            )
        is_pruned, epochs_seen = False, 0
        while self._job.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for epoch, accuracy in _read_metrics(metrics)[epochs_seen:]:
                epochs_seen += 1
                trial.report(accuracy, epoch)
                if trial.should_prune() and not is_pruned:
                    is_pruned = True
                    self._job.send_signal(signal.SIGTERM)
        best = JobDir(folder).read_metrics()
        if best:
            return Outcome("COMPLETE", best["val_accuracy"])
        if is_pruned and self._job.returncode == cli.EXIT_STOPPED:
            return Outcome("PRUNED", None)
        return Outcome("FAIL", None, _last_line(f"{folder}.log"))

    def _record(self, trial: Any, outcome: Outcome) -> None:
        state = _optuna().trial.TrialState[outcome.state]
        self._study.tell(trial, outcome.val_accuracy, state=state)
        values = ", ".join(f"{name} {value:.4g}" for name, value in trial.params.items())
        reached = (
            f"val_accuracy {outcome.val_accuracy:.4f}" if outcome.val_accuracy is not None else outcome.state.lower()
        )
        logging.info("trial %d: %s with %s", trial.number, reached, values)
        if self._done():
            self._write_results()

    def _write_results(self) -> None:
        names = list(self._distributions)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", "state", "val_accuracy", "epochs", *names, "job_dir"])
        for trial in self._done():
            values = [trial.params[name] for name in names]
            reached = max([trial.value or 0, *trial.intermediate_values.values()])
            epochs = len(trial.intermediate_values)
            writer.writerow([trial.number, trial.state.name, f"{reached:.6g}", epochs, *values, self._folder(trial)])
        files.atomic_write(f"{self._directory}/trials.csv", text.getvalue())
        if any(trial.state.name == "COMPLETE" for trial in self._done()):
            best = self._study.best_trial
            lines = [f"--{name}={value}\n" for name, value in {**self._fixed, **best.params}.items()]
            files.atomic_write(f"{self._directory}/best.flags", "".join(lines))
            plots.write_study(f"{self._directory}/tuning.png", self._done(), names, SCALES)

    def _print_best(self) -> None:
        best = self._study.best_trial
        print(f"best val_accuracy {best.value:.4f} (trial {best.number} of {len(self._done())})")
        print(f"picture: {self._directory}/tuning.png; model: {JobDir(self._folder(best)).saved_model}")
        words = f"--flagfile={self._directory}/best.flags", f"--data_dir={self._data_dir}", "--job_dir=job"
        print("train with it: " + shlex.join(["python", "-m", "trainer.task", *words]), flush=True)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna is not installed: pip install '.[tune]'.") from None
    return optuna


def _distribution(name: str) -> Any:
    optuna, space = _optuna(), SPACE[name]
    if name in CHOICES:
        return optuna.distributions.CategoricalDistribution(space)
    lowest, highest, is_logarithmic = space
    return optuna.distributions.FloatDistribution(lowest, highest, log=is_logarithmic)


def _read_metrics(path: str) -> list[tuple[int, float]]:
    """(epoch, val_accuracy) of each epoch that a trial has told so far; it may be writing at this moment."""
    contents = files.read(path) or b""
    rows = []
    for line in contents.decode().splitlines(keepends=True):
        if line.endswith("\n") and "val_accuracy" in (row := json.loads(line)):
            rows.append((int(row["global_step"]), float(row["val_accuracy"])))
    return rows


def _last_line(path: str) -> str:
    lines = (files.read(path) or b"").decode(errors="replace").split("\n")
    return next((line for line in lines if line.startswith("error:")), next((x for x in reversed(lines) if x), ""))


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
