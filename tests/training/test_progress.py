"""Progress bars on a terminal, and log lines elsewhere."""

import time

import pytest

from trainer.training import progress
from trainer.training.cost import Cost
from trainer.training.loop import EpochTotals
from trainer.training.progress import ProgressReporter

FREE = Cost(0, machines=1, limit=0)


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if not record.getMessage().startswith("First steps")]


def test_the_bar_shows_the_time_left_for_epoch_and_job(capsys):
    reporter = ProgressReporter(shows_bars=True, last_stage="all", cost=FREE)
    half = EpochTotals(steps=5, loss=3.0, correct=5.0, examples=10.0, seconds=20.0)
    reporter.on_steps("head", epoch=1, epochs_left=1, steps=10, totals=half)
    reporter.close()
    assert "epoch 20 s, job over 1 min 00 s left" in capsys.readouterr().err
    reporter.on_steps("all", epoch=3, epochs_left=0, steps=10, totals=half)
    reporter.close()
    assert "epoch 20 s, job 20 s left" in capsys.readouterr().err


def test_the_time_left_has_the_end_of_the_job_and_not_the_first_step_again(capsys):
    reporter = ProgressReporter(shows_bars=True, last_stage="all", cost=FREE)
    reporter.phase_seconds["start"] = 2.0
    for steps, seconds in ((1, 60.0), (3, 64.0)):
        totals = EpochTotals(steps=steps, examples=10.0, seconds=seconds)
        reporter.on_steps("all", epoch=1, epochs_left=1, steps=10, totals=totals)
    reporter.close()
    end = 2 * progress.CLOSING_OVER_START
    assert f"epoch 14 s, job {14 + 20 + end} s left" in capsys.readouterr().err


def test_phases_are_logged_and_measured_and_long_passes_too(caplog, monkeypatch):
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    reporter = ProgressReporter(shows_bars=False, last_stage="all", cost=FREE)
    with caplog.at_level("INFO", logger="absl"):
        for _ in range(2):
            with reporter.phase("export", "Exporting."), reporter.bar("computing features", 40) as bar:
                for seconds in (20, 20, 20, 20):
                    now[0] += seconds
                    bar.update(10)
    assert reporter.phase_seconds == {"export": 160}
    assert messages(caplog) == 2 * ["Exporting.", "computing features: 20 of 40 images, 40 s left"]


def test_without_a_terminal_progress_is_logged_every_30_seconds(caplog, monkeypatch, capsys):
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    reporter = ProgressReporter(shows_bars=False, last_stage="all", cost=FREE)
    totals = EpochTotals(steps=4, loss=3.0, correct=5.0, examples=8.0, seconds=4.0)
    with caplog.at_level("INFO", logger="absl"):
        for seconds in (1, 30, 1, 30):
            now[0] += seconds
            reporter.on_steps("all", epoch=2, epochs_left=0, steps=10, totals=totals)
    lines = messages(caplog)
    assert len(lines) == 2
    assert lines[0] == (
        "epoch 2 (whole network): step 4 of 10, epoch 6.0 s, job 6.0 s left; loss 0.3750 accuracy 0.6250 2.0 img/s"
    )
    assert "\r" not in capsys.readouterr().err


def test_with_a_price_the_line_has_the_cost_so_far_and_at_the_end(caplog, monkeypatch):
    cost = Cost(3600, machines=2, limit=0, clock=lambda: 0, seconds_before=100)
    reporter = ProgressReporter(shows_bars=False, last_stage="all", cost=cost)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with caplog.at_level("INFO", logger="absl"):
        totals = EpochTotals(steps=5, examples=40, seconds=50)
        reporter.on_steps("all", epoch=1, epochs_left=1, steps=10, totals=totals)
    assert "epoch 50 s, job 2 min 30 s left; cost 200.00, 500.00 in the end" in caplog.text


@pytest.mark.parametrize("is_best", [False, True])
def test_complete_epochs_are_aligned_rows_that_fit_100_columns(caplog, is_best):
    row = {"epoch": 3, "stage": "all", "loss": 0.5, "accuracy": 0.75, "val_loss": 0.625, "val_accuracy": 0.875}
    row |= {"seconds": 20.0, "images_per_second": 12.5}
    long = row | {"epoch": 100, "loss": 12.5, "accuracy": 1.0, "seconds": 3599.0}
    times = {"input_wait_seconds": 5.0, "validation_seconds": 2.0, "saving_seconds": 0.25}
    reporter = ProgressReporter(shows_bars=False, last_stage="all", cost=FREE)
    with caplog.at_level("INFO", logger="absl"):
        reporter.on_epoch(row, times, is_best=is_best, num_validated=2400)
        reporter.on_epoch(long, times, is_best=is_best, num_validated=2400)
    header, *rows = messages(caplog)
    best = "  best" if is_best else ""
    assert header == "epoch  stage            loss  accuracy  val_loss  val_accuracy"
    assert rows == [
        f"    3  whole network  0.5000    75.0\u00a0%    0.6250  87.50\u00a0% (2100 of 2400)        20 s{best}",
        f"  100  whole network  12.5000   100.0\u00a0%    0.6250  87.50\u00a0% (2100 of 2400)  59 min 59 s{best}",
    ]
    assert max(map(len, rows)) + len("13:05:59 ") <= 102


ADVICE = "Try --cache=memory."


def log_epochs(*epochs: tuple[float, float], advice: str = ADVICE) -> None:
    """Logs epochs of (seconds, seconds of waiting for the input)."""
    reporter = ProgressReporter(shows_bars=False, last_stage="all", cost=FREE)
    for seconds, waited in epochs:
        row = {"epoch": 1, "stage": "all", "seconds": seconds, "images_per_second": 9.0}
        row |= dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), 0.5)
        times = {"input_wait_seconds": waited, "validation_seconds": 1.0, "saving_seconds": 0.0}
        reporter.on_epoch(row, times, is_best=False, num_validated=10, slow_input_advice=advice)


def test_epochs_that_wait_for_images_log_advice_once(caplog):
    with caplog.at_level("INFO", logger="absl"):
        log_epochs((100, 38), (100, 50))
    advice = [message for message in caplog.messages if "the device waits" in message]
    assert advice == [f"Input wait 38 %: the device waits for images. {ADVICE}"]


@pytest.mark.parametrize(
    ("seconds", "waited", "advice"),
    [
        pytest.param(100, 5, ADVICE, id="a small share"),
        pytest.param(9.9, 3.8, ADVICE, id="a short epoch"),
        pytest.param(100, 38, "", id="a stage on features"),
    ],
)
def test_other_epochs_log_no_advice(caplog, seconds, waited, advice):
    with caplog.at_level("INFO", logger="absl"):
        log_epochs((seconds, waited), advice=advice)
    assert not [message for message in caplog.messages if "the device waits" in message]
