"""What a job costs: told as it goes on, and a limit that ends it with a model, to be gone on with."""

import json
import subprocess
import sys

import pytest

from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from tests.support.processes import run_command
from trainer.training.cost import Cost
from trainer.training.loop import EpochTotals
from trainer.training.progress import ProgressReporter


def test_the_cost_is_the_price_of_all_machines_over_all_starts():
    now = [1000.0]
    cost = Cost(7.2, 3, limit=0.7, clock=lambda: now[0])
    cost.seconds_before = 60
    now[0] += 40
    assert cost.seconds() == 100
    assert cost.after() == pytest.approx(7.2 * 3 * 100 / 3600)
    assert cost.after(100) == pytest.approx(7.2 * 3 * 200 / 3600)
    assert not cost.limit_reached()
    now[0] += 20
    assert cost.limit_reached()
    assert not Cost(7.2, 3, limit=0, clock=lambda: now[0]).limit_reached()


def test_the_progress_line_tells_cost_so_far_and_in_the_end(caplog, monkeypatch):
    terminal = ProgressReporter(False, last_stage="all", cost=Cost(3600, 2, 0, clock=lambda: 0, seconds_before=100))
    monkeypatch.setattr("trainer.terminal.SECONDS_BETWEEN_LINES", 0)
    with caplog.at_level("INFO", "absl"):
        terminal.on_round("all", 1, 1, 10, EpochTotals(steps=5, examples=40, seconds=50))
    assert "epoch 50 s, job 2 min 30 s left; cost 200.00, 500.00 in the end" in caplog.text


def test_a_limit_without_a_price_is_told(tmp_path):
    answer = run_command("trainer.task", f"--data_dir={tmp_path}", f"--job_dir={tmp_path / 'job'}", "--max_cost=3")
    assert answer.returncode == 2
    assert "--max_cost is 3.0, but no --price_per_hour" in answer.stderr


@pytest.mark.slow
def test_at_its_limit_a_job_saves_exports_and_goes_on_with_a_higher_one(tmp_path):
    images = write_images(tmp_path / "pictures", {"a": 20, "b": 20}, noise=90)
    job_dir = tmp_path / "job"

    def run(max_cost: int, *more) -> tuple[str, dict]:
        flags = [f"--data_dir={images}", f"--job_dir={job_dir}", "--weights=none", "--image_size=32", "--head_epochs=0",
                 "--epochs=100000", "--batch_size=8", "--price_per_hour=3600", f"--max_cost={max_cost}"]  # fmt: skip
        answer = subprocess.run([sys.executable, TINY_JOB, *flags, *more], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        metrics = job_dir / "metrics.json"
        return answer.stderr, json.loads(metrics.read_text()) if metrics.exists() else {}

    limit = 10  # seconds, as the price is: enough for an epoch where nothing else is at work
    said, metrics = run(limit)
    while not metrics:
        assert "No epoch is complete, so there is no model yet" in said
        assert limit < 1000
        limit *= 2
        said, metrics = run(limit)
    assert f"Stopped: the job has cost {limit}." in said
    assert metrics["stopped_by_cost"]
    assert metrics["cost"] >= limit
    assert (job_dir / "saved_model" / "saved_model.pb").exists()
    said, again = run(limit)
    assert "which is all it may: raise --max_cost" in said
    assert again == metrics
    said, more = run(int(metrics["cost"]) + 5)
    assert "Going on from the save" in said
    assert more["cost"] >= int(metrics["cost"]) + 5
