"""--on_epoch runs the command with the epoch as JSON, and neither a failure nor a command that hangs stops the job."""

import json
import time

import psutil
import pytest

from trainer.reporting import epoch_command

ROW = {"epoch": 2, "stage": "head", "val_accuracy": 0.9375}


def test_the_command_receives_the_row_and_the_job_dir_as_json(tmp_path):
    run = epoch_command.make_runner(f"cat > '{tmp_path}/row.json'", "gs://bucket/job")
    run(ROW)
    assert json.loads((tmp_path / "row.json").read_text()) == {**ROW, "job_dir": "gs://bucket/job"}


def test_without_a_command_nothing_runs(caplog):
    epoch_command.make_runner("", "job")(ROW)
    assert not caplog.records


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo first; echo no server >&2; exit 3", "--on_epoch after epoch 2: exit code 3: no server."),
        ("/no/such/program", "exit code 127: "),
        ("kill -9 $$", "exit code -9: no output."),
    ],
)
def test_a_failure_is_logged(command, message, caplog):
    epoch_command.make_runner(command, "job")(ROW)
    assert message in caplog.text


def test_a_command_that_hangs_is_killed_with_its_children_and_later_not_run_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(epoch_command, "TIMEOUT_SECS", 0.3)
    run = epoch_command.make_runner(f"sleep 60 & echo $! >> '{tmp_path}/children'; wait", "job")
    started = time.monotonic()
    for epoch in range(epoch_command.MAX_TIMEOUTS + 2):
        run({**ROW, "epoch": epoch})
    assert time.monotonic() - started < 10
    assert caplog.text.count("timeout: killed after 0.3 s") == epoch_command.MAX_TIMEOUTS
    assert "epoch 2: timeout: killed after 0.3 s; it is not run again." in caplog.text
    children = (tmp_path / "children").read_text().split()
    assert len(children) == epoch_command.MAX_TIMEOUTS
    deadline = time.monotonic() + 10  # a killed process is seen for a moment after the signal was sent
    while any(map(_is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, children))


def _is_running(process_id: str) -> bool:
    try:
        return psutil.Process(int(process_id)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_left_in_the_background_does_not_delay_the_job(tmp_path):
    started = time.monotonic()
    epoch_command.make_runner("sleep 5 & exit 0", "job")(ROW)
    assert time.monotonic() - started < 4
