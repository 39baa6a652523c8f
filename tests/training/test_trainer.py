"""A stage ends when nothing better came for as many epochs as --early_stopping_patience says, and says so."""

import csv
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.support.images import write_images
from tests.support.paths import TINY_JOB


@pytest.mark.slow
def test_a_stage_ends_when_nothing_better_comes_and_stays_ended(tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 20, "b": 20}, noise=90)
    job_dir = tmp_path / "job"
    flags = [f"--data_dir={images}", f"--job_dir={job_dir}", "--weights=none", "--image_size=32", "--head_epochs=0",
             "--epochs=500", "--batch_size=8", "--learning_rate=1e-9", "--early_stopping_patience=3"]  # fmt: skip

    def run() -> str:
        answer = subprocess.run([sys.executable, TINY_JOB, *flags], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        return answer.stderr

    assert "Stage all stops early: no better for 3 epochs." in run()
    with open(job_dir / "history.csv", newline="") as file:
        accuracies = [float(row["val_accuracy"]) for row in csv.DictReader(file)]
    best = json.loads((job_dir / "metrics.json").read_text())["best_epoch"]
    assert len(accuracies) < 500
    assert max(accuracies[-3:]) <= accuracies[best - 1] == max(accuracies)
    page = (job_dir / "report" / "index.html").read_text()
    assert f"ended after {len(accuracies)} of them" in page
    assert "since no better one came" in page
    assert "is finished" in run()


def test_the_patience_counts_the_epochs_of_the_stage_alone():
    from trainer.training.trainer import Trainer

    def is_over(accuracies: list[float], before: list[float] = [], patience: int = 2) -> bool:  # noqa: B006
        rows = [{"stage": "head", "val_accuracy": value} for value in before]
        rows += [{"stage": "all", "val_accuracy": value} for value in accuracies]
        run = SimpleNamespace(_patience=patience, progress=SimpleNamespace(stage_epochs=len(accuracies), history=rows))
        return Trainer._is_early_stop(run, SimpleNamespace(name="all"))

    assert not is_over([0.5])
    assert not is_over([0.5, 0.4])
    assert is_over([0.5, 0.4, 0.5])
    assert not is_over([0.5, 0.4, 0.6])
    assert not is_over([0.5, 0.6], before=[0.9, 0.9, 0.9])  # what the head reached is no measure for the network
    assert not is_over([0.5, 0.4, 0.3, 0.2], patience=0)


def test_who_waits_for_pictures_is_told_once_what_to_try():
    from trainer import job

    def hint(waited: float, seconds: float, said: str = "", advice: str = "Try --cache=memory.") -> str:
        result = SimpleNamespace(times={"input_wait_seconds": waited}, row={"seconds": seconds})
        return job._log_slow_input(SimpleNamespace(slow_input_advice=advice), result, said)

    assert hint(38, 100) == "Input wait 38 %: the device waits for pictures. Try --cache=memory."
    assert hint(38, 100, said="before") == "before"
    assert hint(5, 100) == hint(3.8, 9.9) == hint(38, 100, advice="") == ""
