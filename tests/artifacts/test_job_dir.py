"""Files in a job_dir are read as they were written."""

import csv

import numpy as np
import pytest

from trainer.artifacts.job_dir import HISTORY_COLUMNS, LABEL_ISSUE_COLUMNS, PREDICTION_COLUMNS, TIME_COLUMNS, JobDir
from trainer.data.dataset import Examples, Split
from trainer.data.listing import BadFile
from trainer.errors import UserError


@pytest.fixture
def paths(tmp_path):
    return JobDir(str(tmp_path))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def examples(*names):
    return Examples(
        paths=np.array([f"{name}/1.jpg" for name in names], object),
        labels=np.arange(len(names), dtype=np.int32),
        hashes=np.array([f"hash-{name}" for name in names], object),
    )


def test_paths_may_be_in_a_bucket():
    assert JobDir("gs://bucket/job/").checkpoint(7) == "gs://bucket/job/checkpoints/000007.npz"


def test_files_that_do_not_exist_are_none_or_empty(paths):
    assert paths.read_config() is None
    assert paths.read_metrics() is None
    assert paths.checkpoint_numbers() == []
    assert not paths.has_progress()


def test_class_names_are_read_as_written(paths):
    class_names = ("a$b", "猫", " spaces ")
    paths.write_split(Split(training=examples(*class_names), validation=examples(*class_names)), class_names)
    assert paths.read_class_names() == class_names
    assert [row["split"] for row in rows_of(paths.split)] == ["training"] * 3 + ["validation"] * 3


def test_missing_class_names_raise_a_user_error(paths):
    with pytest.raises(UserError, match=r"labels\.txt.* does not exist"):
        paths.read_class_names()


def test_checkpoint_numbers_are_sorted_and_other_files_ignored(paths, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("000010.npz", "000009.npz", "features.npz", "lock", "000011.damaged"):
        (tmp_path / "checkpoints" / name).touch()
    assert paths.checkpoint_numbers() == [9, 10]


@pytest.mark.parametrize("name", ["checkpoints/000001.npz.damaged", "best.weights.h5", "metrics.json"])
def test_checkpoints_weights_and_metrics_are_progress(paths, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert paths.has_progress()


def test_tables_have_their_columns(paths):
    row = dict.fromkeys((*HISTORY_COLUMNS, *TIME_COLUMNS), 1.0004) | {"epoch": 1, "stage": "all"}
    paths.write_history([row])
    paths.write_times([row])
    paths.write_bad_files([BadFile("cat/1.jpg", "empty")])
    assert rows_of(paths.history) == [{name: str(row[name]) for name in HISTORY_COLUMNS}]
    assert rows_of(paths.time)[0]["input_wait_seconds"] == "1.0"  # milliseconds
    assert rows_of(paths.bad_files) == [{"path": "cat/1.jpg", "reason": "empty"}]


def test_predictions_have_top_class_and_label_probability(paths):
    probabilities = np.array([[0.25, 0.75], [0.125, 0.875]], np.float32)
    paths.write_predictions(examples("cat", "dog"), probabilities, ("cat", "dog"))
    assert [tuple(row[name] for name in PREDICTION_COLUMNS) for row in rows_of(paths.predictions)] == [
        ("cat/1.jpg", "cat", "dog", "0.75", "0.25"),
        ("dog/1.jpg", "dog", "dog", "0.875", "0.875"),
    ]


def test_partial_files_of_killed_processes_are_deleted(paths, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in (".12-34-metrics.json", "checkpoints/.12-34-000001.npz"):
        (tmp_path / name).touch()
    (tmp_path / "metrics.json").touch()
    paths.remove_partial_files()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "metrics.json"]


def test_label_issues_have_the_probability_of_the_label(paths):
    probabilities = np.array([[0.1, 0.9], [0.75, 0.25]], np.float32)
    paths.write_label_issues(examples("a", "b"), probabilities, ("a", "b"))
    rows = [tuple(row[column] for column in LABEL_ISSUE_COLUMNS) for row in rows_of(paths.label_issues)]
    assert rows == [("a/1.jpg", "a", "b", "0.1"), ("b/1.jpg", "b", "a", "0.25")]


@pytest.mark.parametrize(("calibration", "temperature"), [(None, 1.0), ({"temperature": 1.5}, 1.5)])
def test_the_temperature_of_a_run_is_1_without_a_calibration(tmp_path, calibration, temperature):
    paths = JobDir(str(tmp_path))
    assert paths.read_temperature() == 1
    paths.write_metrics({"val_accuracy": 0.5} | ({"calibration": calibration} if calibration else {}))
    assert paths.read_temperature() == temperature


@pytest.mark.parametrize("calibration", [3, {"temperature": 0}, {"temperature": "1"}, {"temperature": -1}])
def test_a_temperature_that_is_none_is_a_user_error(tmp_path, calibration):
    paths = JobDir(str(tmp_path))
    paths.write_metrics({"val_accuracy": 0.5, "calibration": calibration})
    with pytest.raises(UserError, match="no temperature above 0 in 'calibration'"):
        paths.read_temperature()
