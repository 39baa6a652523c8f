"""A record holds the files of one run, finished or not."""

import json

import pytest

from tests.support.written_job import CLASSES, HISTORY, METRICS, make_job_dir
from trainer.artifacts import run_record
from trainer.errors import UserError


def test_a_finished_run_has_its_metrics_and_best_epoch(tmp_path):
    run = run_record.read(str(make_job_dir(tmp_path, timed=True)))
    assert (run.is_running, run.is_evaluation) == (False, False)
    assert run.metrics == METRICS
    assert run.best_row["epoch"] == 3
    assert run.training_counts == dict.fromkeys(CLASSES, 4)
    assert run.num_validation == 8
    assert (run.accuracy_estimate["correct"], run.accuracy_estimate["total"]) == (6, 8)
    assert run.accuracy_estimate["low"] < 0.75 < run.accuracy_estimate["high"]
    assert run.times[2]["compute_seconds"] == 20


def test_before_the_first_epoch_there_is_no_estimate(tmp_path):
    run = run_record.read(str(make_job_dir(tmp_path, history=(), with_predictions=False, finished=False)))
    assert run.is_running
    assert (run.best_row, run.accuracy_estimate, run.classification) == ({}, {}, None)


def test_a_running_job_has_the_estimate_of_its_best_epoch(tmp_path):
    job_dir = make_job_dir(tmp_path, history=HISTORY[:1], with_predictions=False, finished=False)
    assert run_record.read(str(job_dir)).accuracy_estimate["correct"] == 5  # 62.5 % of 8


def test_a_finished_run_that_resumes_with_more_epochs_is_running(tmp_path):
    job_dir = make_job_dir(tmp_path)
    for epochs, is_running in (([2, 3], False), ([2, 1], True)):
        (job_dir / "metrics.json").write_text(json.dumps({**METRICS, "epochs": epochs}))
        assert run_record.read(str(job_dir)).is_running == is_running


def test_mistakes_are_sorted_by_probability_and_confused_pairs_counted(tmp_path):
    run = run_record.read(str(make_job_dir(tmp_path)))
    assert [row["path"] for row in run.mistakes] == [f"{CLASSES[0]}/0.png", f"{CLASSES[1]}/1.png"]
    assert [row["probability"] for row in run.uncertain] == sorted(run.top_probabilities)
    assert [(pair["label"], pair["predicted"], pair["count"], pair["of"]) for pair in run.confused_pairs] == [
        (CLASSES[0], CLASSES[1], 1, 2),
        (CLASSES[1], CLASSES[2], 1, 2),
    ]


def test_heat_maps_of_another_epoch_are_ignored(tmp_path):
    job_dir = make_job_dir(tmp_path, explained=True)
    path = f"{CLASSES[0]}/0.png"
    assert run_record.read(str(job_dir)).heatmap(path).shape == (3, 3)
    heatmaps = json.loads((job_dir / "gradcam.json").read_text())
    (job_dir / "gradcam.json").write_text(json.dumps({**heatmaps, "epoch": 2}))
    assert run_record.read(str(job_dir)).heatmap(path) is None


def test_a_folder_without_a_run_raises_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        run_record.read(str(tmp_path))


def test_predictions_of_another_run_raise_a_user_error(tmp_path):
    job_dir = make_job_dir(tmp_path)
    (job_dir / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"not in labels\.txt"):
        _ = run_record.read(str(job_dir)).classification
