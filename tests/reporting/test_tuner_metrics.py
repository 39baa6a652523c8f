"""Each tuner receives the metrics in its own format."""

import json
import os

import pytest

from trainer.reporting import tuner_metrics

ROW = {"epoch": 3, "val_accuracy": 0.9312, "val_loss": 0.25, "loss": 0.1}


def test_vertex_reads_a_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "hypertune" / "output.metrics"
    monkeypatch.setenv("CLOUD_ML_HP_METRIC_FILE", str(path))  # cloudml-hypertune reads the environment itself
    monkeypatch.setenv("CLOUD_ML_TRIAL_ID", "7")
    tuner_metrics.make_reporter(os.environ)(ROW)
    accuracy, loss = map(json.loads, path.read_text().splitlines())
    assert (accuracy["trial"], accuracy["global_step"], accuracy["val_accuracy"]) == ("7", "3", "0.9312")
    assert loss["val_loss"] == "0.25"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("environment", "output"),
    [
        ({"KATIB_TRIAL_NAME": "trainer-x7f2kq9d"}, ["epoch=3", "val_accuracy=0.9312", "val_loss=0.25"]),
        ({}, []),
    ],
)
def test_katib_reads_the_output(environment, output, capsys):
    tuner_metrics.make_reporter(environment)(ROW)
    assert capsys.readouterr().out.splitlines() == output
