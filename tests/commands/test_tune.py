"""Studies on this machine, with real jobs of a small network, and their errors."""

import csv
import pathlib
import signal
import subprocess
import sys
import time

import optuna
import pytest
from PIL import Image

from tests.support.images import write_images
from tests.support.paths import TINY_TUNE
from tests.support.processes import run_command
from tests.support.trainer_flags import flags_of
from trainer import tune
from trainer.artifacts.job_dir import JobDir
from trainer.config import DEFAULTS

NUM_TRIALS = 3
FLAGS = ["--weights=none", "--image_size=32", "--head_epochs=0", "--epochs=40", "--batch_size=16", "--precision=float32",
         "--steps_per_loop=1"]  # fmt: skip
STATES = optuna.trial.TrialState


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 40, "b": 30}, noise=90)


def start(images, job_dir, *more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, TINY_TUNE, f"--data_dir={images}", f"--job_dir={job_dir}", *FLAGS, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows_of(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_an_interrupted_study_resumes_its_trial_and_keeps_the_best(images, tmp_path):
    study = tune.StudyDir(str(tmp_path / "study"))
    arguments = [images, study.root, f"--trials={NUM_TRIALS}", "--tune=learning_rate,dropout"]
    process = start(*arguments)
    while not pathlib.Path(JobDir(study.trial(1)).checkpoint(3)).exists():  # the second trial is running
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    process = start(*arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "Resuming from the checkpoint" in pathlib.Path(f"{study.trial(1)}.log").read_text()
    assert f"--flagfile={study.best_flags}" in output
    assert f"--job_dir={study.best_job}" in output
    check_results(study)
    process = start(images, study.root, "--trials=9", "--tune=dropout")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "holds a study of" in output


def check_results(study: tune.StudyDir) -> None:
    rows = rows_of(study.results)
    assert len(rows) == NUM_TRIALS
    assert {row["state"] for row in rows} <= {"COMPLETE", "PRUNED"}
    metrics = {row["job_dir"]: JobDir(row["job_dir"]).read_metrics() for row in rows if row["state"] == "COMPLETE"}
    # Of equally accurate trials, the one with the lower loss.
    best_dir = max(metrics, key=lambda name: (metrics[name]["val_accuracy"], -metrics[name]["val_loss"]))
    best = next(row for row in rows if row["job_dir"] == best_dir)
    assert metrics[best_dir]["val_accuracy"] == pytest.approx(float(best["val_accuracy"]), rel=1e-5)
    lines = pathlib.Path(study.best_flags).read_text().splitlines()
    best_flags = dict(line.removeprefix("--").split("=") for line in lines)
    assert float(best_flags["learning_rate"]) == pytest.approx(float(best["learning_rate"]))
    assert best_flags["batch_size"] == "16"
    with Image.open(study.plot) as image:
        assert image.width > 900


POOR_TRIAL = """
import signal, sys, time, hypertune
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
reporter = hypertune.HyperTune()
for epoch in range(1, 600):
    reporter.report_hyperparameter_tuning_metric("val_accuracy", 0.1, global_step=epoch)
    time.sleep(0.05)
"""  # reports its metrics as trainer.task does, without training


def test_a_trial_that_is_worse_than_the_median_is_pruned(tmp_path, monkeypatch):
    study = tune.StudyDir(str(tmp_path))
    pathlib.Path(study.trials).mkdir()
    (tmp_path / "poor.py").write_text(POOR_TRIAL)
    monkeypatch.setattr(tune, "TRIAL_COMMAND", (sys.executable, str(tmp_path / "poor.py")))
    monkeypatch.setattr(tune, "STARTUP_TRIALS", 1)
    tuner = tune.Tuner(study, "pictures", ["dropout", "batch_size"], {})
    good = tuner._study.ask(tuner._distributions)
    for epoch in range(1, 600):
        good.report(0.9, epoch)
    tuner._study.tell(good, 0.9)
    poor = tuner._study.ask(tuner._distributions)
    activities = []
    outcome = tuner._run_trial(poor, activities.append)
    assert activities
    assert all(activity.startswith(f"trial {poor.number}, epoch ") for activity in activities)
    assert (outcome.state, outcome.val_accuracy) == (STATES.PRUNED, None)
    tuner._record(poor, outcome)
    rows = rows_of(study.results)
    assert [row["state"] for row in rows] == ["COMPLETE", "PRUNED"]
    assert tune.EPOCHS_BEFORE_PRUNING <= int(rows[1]["epochs"]) < 599
    assert pathlib.Path(study.plot).stat().st_size > 1000


def test_study_files_have_the_documented_names():
    study = tune.StudyDir("study")
    paths = [study.journal, study.results, study.plot, study.best_flags, study.trial(7)]
    assert paths == [
        "study/study.log",
        "study/trials.csv",
        "study/tuning.png",
        "study/best.flags",
        "study/trials/007",
    ]


def names_to_tune(*arguments: str) -> list[str]:
    values = flags_of(tune.define_flags)
    values(["trainer.tune", *arguments])
    given = [name for name in DEFAULTS if name in values and values[name].present]
    settings, given = tune._settings({name: values[name].value for name in DEFAULTS if name in values}, given)
    return tune._names_to_tune(values.tune, settings, given)


def test_flags_that_have_an_effect_and_are_not_set_are_tuned():
    assert names_to_tune() == ["head_learning_rate", "dropout", "label_smoothing", "batch_size"]
    assert names_to_tune("--epochs=3") == ["learning_rate", "dropout", "label_smoothing", "batch_size"]
    assert names_to_tune("--recipe=finetune", "--head_epochs=15") == list(tune.SPACE)
    assert names_to_tune("--dropout=0.1", "--batch_size=8") == ["head_learning_rate", "label_smoothing"]
    assert names_to_tune("--dropout=0.1", "--tune=dropout") == ["dropout"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--tune=optimizer", "--tune=optimizer: pass one or more of head_learning_rate"),
        ("--tune=learning_rate", "--tune=learning_rate has no effect with --head_epochs=15 --epochs=-1"),
        ("--job_dir=gs://bucket/study", "needs a local folder"),
        ("--trials=0", "--trials=0"),
        ("--dropout=2", "--dropout is 2.0: pass a number of at least 0 and of at most 0.95"),
        ("--weights=none", "a head on features of random weights learns little"),
    ],
)
def test_wrong_flags_are_one_line_before_the_first_trial(images, tmp_path, flag, message):
    result = run_command("trainer.tune", f"--data_dir={images}", f"--job_dir={tmp_path / 'study'}", flag)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "study").exists()


def test_a_first_trial_that_fails_ends_the_study(tmp_path):
    study = tune.StudyDir(str(tmp_path / "study"))
    result = run_command("trainer.tune", f"--data_dir={tmp_path / 'nowhere'}", f"--job_dir={study.root}", "--trials=5")
    assert result.returncode == 2, result.stderr
    assert "Trial 0 failed: error:" in result.stderr
    assert "nowhere" in result.stderr.splitlines()[-1]
    assert not pathlib.Path(f"{study.trial(1)}.log").exists()
