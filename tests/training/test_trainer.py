"""Early stopping of a stage."""

import csv
import subprocess
import sys

import numpy as np
import pytest

from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from trainer.artifacts.job_dir import JobDir
from trainer.models.networks import Network
from trainer.training.interruption import StopReason
from trainer.training.trainer import HEAD, WHOLE_NETWORK, Callbacks, Stage, Trainer, TrainerOptions


@pytest.mark.slow
def test_a_stage_that_stopped_early_is_finished(tmp_path):
    images, job_dir = write_images(tmp_path / "pictures", {"a": 20, "b": 20}, noise=90), tmp_path / "job"
    flags = [f"--data_dir={images}", f"--job_dir={job_dir}", "--weights=none", "--image_size=32", "--head_epochs=0",
             "--epochs=500", "--batch_size=8", "--learning_rate=1e-9", "--early_stopping_patience=3"]  # fmt: skip

    def run() -> str:
        result = subprocess.run([sys.executable, TINY_JOB, *flags], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stderr

    paths = JobDir(str(job_dir))
    assert "Stage all stops early: no better val_accuracy for 3 epochs." in run()
    with open(paths.history, newline="") as file:
        accuracies = [float(row["val_accuracy"]) for row in csv.DictReader(file)]
    best_epoch = paths.read_metrics()["best_epoch"]
    assert len(accuracies) < 500
    assert max(accuracies[-3:]) <= accuracies[best_epoch - 1] == max(accuracies)
    assert "is finished" in run()


def make_trainer(tmp_path, *, patience: int) -> Trainer:
    """A trainer without networks, on which only the decision to stop can be tested."""
    return Trainer(
        Network(None, None, None),
        paths=JobDir(str(tmp_path)),
        is_chief=False,
        validation_labels=np.zeros(0, int),
        options=TrainerOptions(
            monitor="val_accuracy",
            label_smoothing=0,
            early_stopping_patience=patience,
            checkpoint_secs=300,
            nan_retries=0,
            steps_per_loop=1,
        ),
        callbacks=Callbacks(lambda *totals: None, lambda: StopReason.NONE, lambda: 0.0),
    )


@pytest.mark.parametrize(
    ("accuracies", "patience", "stops"),
    [
        ([0.5], 2, False),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.4, 0.3, 0.2], 0, False),
    ],
)
def test_the_patience_counts_epochs_that_are_not_better(tmp_path, accuracies, patience, stops):
    trainer = make_trainer(tmp_path, patience=patience)
    trainer.state.stage, trainer.state.stage_epochs = WHOLE_NETWORK, len(accuracies)
    trainer.state.ranks = [[value, -1.0] for value in accuracies]

    def no_batches(*arguments):
        raise KeyError("an epoch was started")

    stage = Stage(
        name=WHOLE_NETWORK,
        epochs=500,
        make_loop=lambda learning_rate_factor: None,
        training_batches=no_batches,
        validation_batches=no_batches,
        training_paths=np.zeros(0, object),
    )
    if stops:
        assert list(trainer.epochs(stage)) == []
    else:
        with pytest.raises(KeyError, match="an epoch was started"):
            list(trainer.epochs(stage))


def test_epochs_of_the_head_do_not_count_for_the_patience_of_the_next_stage(tmp_path):
    trainer = make_trainer(tmp_path, patience=2)
    trainer.state.stage, trainer.state.stage_epochs, trainer.state.ranks = HEAD, 3, [[0.9, -0.1]] * 3

    def make_loop(learning_rate_factor):
        raise KeyError("the stage was started")

    with pytest.raises(KeyError, match="the stage was started"):
        list(trainer.epochs(Stage(WHOLE_NETWORK, 5, make_loop, None, None, np.zeros(0, object))))
    assert trainer.state.ranks == []
