"""A job_dir and a SavedModel from before the packages of trainer/ existed still work.

old_job_dir.zip was made by that code: a run killed in its fifth epoch of eight (three of the head, five of the whole
network), the history of the same run without the kill, a SavedModel and what trainer.predict answered with it.
"""

import csv
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tests.support.paths import ROOT, TINY_JOB
from tests.support.processes import run_command

FLAGS = [
    "--data_dir=pictures",
    "--job_dir=job",
    "--weights=given.weights.h5",
    "--image_size=32",
    "--batch_size=8",
    "--head_epochs=3",
    "--epochs=5",
    "--learning_rate=3e-3",
    "--head_learning_rate=0.02",
    "--dropout=0.3",
    "--warmup_epochs=1",
    "--precision=float32",
    "--preprocessing=rescale",
    "--steps_per_loop=1",
    "--optimizer=adam",
]


@pytest.fixture
def old(tmp_path):
    with zipfile.ZipFile(ROOT / "tests" / "end_to_end" / "old_job_dir.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_an_old_job_dir_resumes_to_the_end_it_would_have_had(old):
    answer = subprocess.run([sys.executable, TINY_JOB, *FLAGS], cwd=old, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "Resuming from the checkpoint after epoch 4." in answer.stderr
    assert "    4  whole network" not in answer.stderr
    resumed, expected = rows_of(old / "job" / "history.csv"), rows_of(old / "finished_history.csv")
    assert [row["stage"] for row in resumed] == ["head"] * 3 + ["all"] * 5
    for name in ("loss", "val_loss", "learning_rate"):  # another processor may round differently
        np.testing.assert_allclose(*([float(row[name]) for row in rows] for rows in (resumed, expected)), rtol=1e-3)


@pytest.mark.slow
def test_an_old_job_dir_with_other_flags_is_refused(old):
    flags = [*FLAGS, "--dropout=0.1"]
    answer = subprocess.run([sys.executable, TINY_JOB, *flags], cwd=old, capture_output=True, text=True, check=False)
    assert answer.returncode == 2, answer.stderr
    assert "dropout: 0.3 -> 0.1" in answer.stderr


@pytest.mark.slow
def test_an_old_saved_model_gives_its_old_answers(old):
    answer = run_command(
        "trainer.predict", f"--model_dir={old}/saved_model", f"--output={old}/new.csv", old / "pictures" / "a"
    )
    assert answer.returncode == 0, answer.stderr
    answers, expected = rows_of(old / "new.csv"), rows_of(old / "old.csv")
    assert [row["label"] for row in answers] == [row["label"] for row in expected]
    for name in ("probability", "probability of a", "probability of b"):
        np.testing.assert_allclose(*([float(row[name]) for row in rows] for rows in (answers, expected)), atol=1e-4)
