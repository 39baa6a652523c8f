"""best.weights.h5 holds the weights and the validation result of one epoch."""

import dataclasses
import resource
import subprocess
import sys

import keras
import numpy as np
import pytest

from trainer.artifacts import best_weights
from trainer.artifacts.best_weights import NO_EPOCH, BestEpoch

BEST = BestEpoch(
    epoch=3,
    val_accuracy=0.75,
    val_loss=0.5,
    balanced_accuracy=0.7,
    probabilities=np.array([[0.25, 0.75], [0.5, 0.5]], np.float32),
    is_readable=np.array([True, False]),
)


def make_model(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input([4]), keras.layers.Dense(2), keras.layers.BatchNormalization()])


def test_weights_and_result_are_read_as_written(tmp_path):
    path = str(tmp_path / "best.weights.h5")
    model, other = make_model(seed=0), make_model(seed=1)
    best_weights.write(path, model, BEST)
    result = best_weights.read(path)
    assert (result.epoch, result.val_accuracy, result.val_loss, result.balanced_accuracy) == (3, 0.75, 0.5, 0.7)
    np.testing.assert_array_equal(result.probabilities, BEST.probabilities)
    np.testing.assert_array_equal(result.is_readable, BEST.is_readable)
    other.load_weights(path)
    for weight, expected in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize(
    ("monitor", "best"),
    [
        ("val_accuracy", 3),  # as accurate as 0 and 1, with the lowest loss of the three
        ("first_val_accuracy", 0),
        ("val_loss", 2),
        ("balanced_accuracy", 4),
    ],
)
def test_equal_epochs_are_decided_by_the_loss_but_for_the_article_rule(monitor, best):
    epochs = [(0.9, 0.6, 0.5), (0.9, 0.5, 0.5), (0.8, 0.2, 0.6), (0.9, 0.4, 0.5), (0.7, 0.9, 0.7)]
    reached, kept = NO_EPOCH, -1
    for number, (accuracy, loss, balanced) in enumerate(epochs):
        epoch = dataclasses.replace(BEST, val_accuracy=accuracy, val_loss=loss, balanced_accuracy=balanced)
        if epoch.rank(monitor) > reached.rank(monitor):
            reached, kept = epoch, number
    assert kept == best


def test_a_missing_file_is_no_epoch(tmp_path):
    assert best_weights.read(str(tmp_path / "best.weights.h5")) is NO_EPOCH


def test_a_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "best.weights.h5"
    model = make_model(seed=0)
    best_weights.write(str(path), model, BEST)
    contents = path.read_bytes()

    def fail(_):
        raise OSError("no space")

    monkeypatch.setattr(model, "save_weights", fail)
    with pytest.raises(OSError, match="no space"):
        best_weights.write(str(path), model, BEST)
    assert path.read_bytes() == contents
    assert list(tmp_path.iterdir()) == [path]


def write_twice(path: str) -> None:
    """Writes the file, and again while no file may be larger than 200 kB. Runs in a process of its own."""
    model = keras.Sequential([keras.Input([64]), *(keras.layers.Dense(64) for _ in range(20))])
    best_weights.write(path, model, BEST)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        best_weights.write(path, model, BEST)
    except OSError as error:
        print("OSError:", error.strerror)


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_keeps_the_previous_file(tmp_path):
    path = tmp_path / "best.weights.h5"
    script = "import sys; from tests.artifacts.test_best_weights import write_twice; write_twice(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr  # without preallocation, HDF5 ends the process
    assert result.stdout == "OSError: File too large\n"
    assert path.stat().st_size > 20 * 64 * 65 * 4
    assert list(tmp_path.iterdir()) == [path]
