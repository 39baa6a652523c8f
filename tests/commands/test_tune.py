"""The study of this machine: real jobs of a tiny network, stopped and gone on with; and what each tuner is told."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.support.images import write_images
from tests.support.paths import TINY_TUNE
from tests.support.processes import run_command
from trainer import tune
from trainer.reporting import tuner_metrics

SCRIPT = TINY_TUNE
TRIALS = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "pictures", {"a": 40, "b": 30}, noise=90)


def start(images, job_dir, *more) -> subprocess.Popen:
    flags = [f"--data_dir={images}", f"--job_dir={job_dir}", "--weights=none", "--image_size=32", "--head_epochs=0",
             "--epochs=40", "--batch_size=16", "--precision=float32", "--steps_per_loop=1"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, SCRIPT, *flags, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_study_is_stopped_goes_on_and_leaves_the_best(images, tmp_path):
    study = tmp_path / "study"
    more = [f"--trials={TRIALS}", "--tune=learning_rate,dropout"]
    process = start(images, study, *more)
    while not (study / "trials" / "001" / "checkpoints" / "000003.npz").exists():  # the second trial is at work
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 143, text
    process = start(images, study, *more)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "Going on from the save" in (study / "trials" / "001.log").read_text()
    rows = list(csv.DictReader((study / "trials.csv").open()))
    assert len(rows) == TRIALS
    assert {row["state"] for row in rows} <= {"COMPLETE", "PRUNED"}
    best = max((row for row in rows if row["state"] == "COMPLETE"), key=lambda row: float(row["val_accuracy"]))
    assert json.loads((pathlib.Path(best["job_dir"]) / "metrics.json").read_text())["val_accuracy"] == pytest.approx(
        float(best["val_accuracy"]), rel=1e-5
    )
    flags = dict(line[2:].split("=") for line in (study / "best.flags").read_text().splitlines())
    assert float(flags["learning_rate"]) == pytest.approx(float(best["learning_rate"]))
    assert flags["batch_size"] == "16"
    with Image.open(study / "tuning.png") as image:
        assert image.width > 900
    assert f"--flagfile={study}/best.flags" in text
    process = start(images, study, "--trials=9", "--tune=dropout")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2, text
    assert "holds a study of" in text


POOR_TRIAL = """
import signal, sys, time, hypertune
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
teller = hypertune.HyperTune()
for epoch in range(1, 600):
    teller.report_hyperparameter_tuning_metric("val_accuracy", 0.1, global_step=epoch)
    time.sleep(0.05)
"""  # a job that tells what it reaches as trainer.task does, without taking minutes to be bad at it


def test_a_trial_that_falls_behind_is_ended_early(tmp_path, monkeypatch):
    (tmp_path / "trials").mkdir()
    (tmp_path / "poor.py").write_text(POOR_TRIAL)
    monkeypatch.setattr(tune, "PROGRAM", (sys.executable, str(tmp_path / "poor.py")))
    monkeypatch.setattr(tune, "STARTUP_TRIALS", 1)
    tuner = tune.Tuner(str(tmp_path), "pictures", ["dropout"], {})
    good = tuner._study.ask(tuner._distributions)
    for epoch in range(1, 600):
        good.report(0.9, epoch)
    tuner._study.tell(good, 0.9)
    poor = tuner._study.ask(tuner._distributions)
    outcome = tuner._run_trial(poor)
    assert (outcome.state, outcome.val_accuracy) == ("PRUNED", None)
    tuner._record(poor, outcome)
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["COMPLETE", "PRUNED"]
    assert tune.EPOCHS_WITHOUT_JUDGEMENT <= int(rows[1]["epochs"]) < 599
    assert (tmp_path / "tuning.png").stat().st_size > 1000


def test_what_cannot_be_tuned_is_told_in_one_line(images, tmp_path):
    where = [f"--data_dir={images}", f"--job_dir={tmp_path / 'study'}"]
    for more, said in {
        ("--tune=optimizer",): "--tune=optimizer: pass some of head_learning_rate",
        ("--tune=learning_rate",): "--tune=learning_rate has no effect with --head_epochs=15 --epochs=0",
        ("--job_dir=gs://bucket/study",): "needs a local folder",
        ("--trials=0",): "--trials=0",
    }.items():
        answer = run_command("trainer.tune", *where, *more)
        assert answer.returncode == 2, answer.stderr
        assert said in answer.stderr
        assert "Traceback" not in answer.stderr


def test_a_mistake_in_a_flag_ends_the_study_at_its_first_trial(images, tmp_path):
    answer = run_command(
        "trainer.tune", f"--data_dir={tmp_path / 'nowhere'}", f"--job_dir={tmp_path / 'study'}", "--trials=5"
    )
    assert answer.returncode == 2, answer.stderr
    assert "nowhere" in answer.stderr.splitlines()[-1]
    assert not (tmp_path / "study" / "trials" / "001.log").exists()


ROW = {"epoch": 3, "val_accuracy": 0.9312, "val_loss": 0.25, "loss": 0.1}


def test_vertex_reads_its_file_and_katib_the_output_and_others_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "hypertune" / "output.metrics"
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(path))  # cloudml-hypertune reads the environment itself
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "7")
    tuner_metrics.make_reporter(os.environ)(ROW)
    assert capsys.readouterr().out == ""
    accuracy, loss = map(json.loads, path.read_text().splitlines())
    assert (accuracy["trial"], accuracy["global_step"], accuracy["val_accuracy"]) == ("7", "3", "0.9312")
    assert loss["val_loss"] == "0.25"
    path.unlink()
    tuner_metrics.make_reporter({"KATIB_TRIAL_NAME": "trainer-x7f2kq9d"})(ROW)
    assert capsys.readouterr().out.splitlines() == ["epoch=3", "val_accuracy=0.9312", "val_loss=0.25"]
    tuner_metrics.make_reporter({})(ROW)
    assert capsys.readouterr().out == ""
    assert not path.exists()
