"""The report is drawn while a run trains, and completed when it ends."""

import csv
import json
import time

import pytest

from tests.support.written_job import make_job_dir
from trainer.config import Config
from trainer.reporting import live, report
from trainer.reporting.live import ReportWriter
from trainer.reporting.tensorboard import TensorBoard


@pytest.mark.slow
def test_the_report_of_a_job_has_heat_maps(finished_job):
    heatmaps = json.loads((finished_job / "gradcam.json").read_text())
    with open(finished_job / "predictions.csv", newline="") as file:
        validation = [row["path"] for row in csv.DictReader(file)]
    assert set(heatmaps["maps"]) == set(validation)  # so few that each is among the least certain
    assert max(max(row) for row in heatmaps["maps"][validation[0]]) == 255
    page = (finished_job / "report" / "index.html").read_text()
    assert page.count('class="heat"') >= len(validation)


@pytest.mark.slow
def test_drawing_takes_at_most_5_percent_of_the_time(tmp_path, monkeypatch):
    job_dir, now, drawings = make_job_dir(tmp_path), [100.0], []

    def draw(*arguments, **options):
        drawings.append(now[0])
        now[0] += 2

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(report, "write", draw)
    writer = ReportWriter(str(job_dir), TensorBoard(str(tmp_path / "logs"), Config().as_dict()))
    for _ in range(3):  # epochs of 50 s
        writer.after_epoch({"epoch": 1}, {})
        now[0] += 50
    assert len(drawings) == 3
    for _ in range(100):  # epochs of 1 s
        writer.after_epoch({"epoch": 1}, {})
        now[0] += 1
    assert len(drawings) <= 3 + 1 + 100 * 0.05 / 2


@pytest.mark.slow
def test_missing_files_of_a_finished_run_are_written_once(tmp_path):
    job_dir = make_job_dir(tmp_path)
    live.write_missing(str(job_dir))
    page = job_dir / "report" / "index.html"
    assert page.exists()
    assert (job_dir / "model_card.md").exists()
    page.unlink()
    live.write_missing(str(job_dir))
    assert not page.exists()
