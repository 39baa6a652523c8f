"""What people watch while a job runs and find when it ends: the log, the page, TensorBoard, heat maps, the model card."""

import csv
import datetime
import io
import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image
from tensorboard import program

from tests.support.images import write_images
from tests.support.paths import TINY_JOB
from tests.support.processes import run_command
from tests.support.written_job import make_job_dir
from trainer.config import HYPERPARAMETERS, Config
from trainer.reporting import model_card, report
from trainer.reporting.live import ReportWriter
from trainer.reporting.tensorboard import TensorBoard
from trainer.training.cost import Cost
from trainer.training.loop import EpochTotals
from trainer.training.progress import ProgressReporter

FLAGS = ["--weights=none", "--head_epochs=0", "--epochs=3", "--image_size=32", "--batch_size=8", "--learning_rate=1e-2",
         "--precision=float32", "--seed=3"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A job_dir, and the lines that the job wrote to standard error where Kubernetes says it is."""
    root = tmp_path_factory.mktemp("display")
    images = write_images(root / "pictures", {"cat": 20, "<b>dog": 15}, noise=120)
    answer = subprocess.run(
        [sys.executable, TINY_JOB, f"--data_dir={images}", f"--job_dir={root / 'job'}", *FLAGS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    )
    assert answer.returncode == 0, answer.stderr
    return root / "job", answer.stderr.splitlines()


@pytest.mark.slow
def test_on_kubernetes_each_line_of_the_log_is_json_with_severity_message_and_time(finished):
    entries = [json.loads(line) for line in finished[1]]
    assert all(set(entry) == {"severity", "message", "time"} for entry in entries)
    assert {entry["severity"] for entry in entries} == {"INFO"}
    assert sum(", val_loss " in entry["message"] for entry in entries) == 3
    ages = [datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(entry["time"]) for entry in entries]
    assert sorted(ages, reverse=True) == ages
    assert ages[0] < datetime.timedelta(hours=1)


@pytest.mark.slow
def test_the_report_of_a_job_shows_where_its_network_looked(finished):
    explained = json.loads((finished[0] / "gradcam.json").read_text())
    validation = [row["path"] for row in rows_of(finished[0] / "predictions.csv")]
    assert set(explained["maps"]) == set(validation)  # so few that each is among the least certain
    assert max(max(row) for row in explained["maps"][validation[0]]) == 255
    page = (finished[0] / "report" / "index.html").read_text()
    assert page.count('class="heat"') >= len(validation)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tensorboard(finished):
    """The real TensorBoard at work on the logs: a function that asks its HTTP interface."""
    board = program.TensorBoard()
    board.configure(argv=["", f"--logdir={finished[0] / 'logs'}", "--port=0", "--load_fast=false"])
    address = board.launch()

    def ask(path, body=None):
        data, headers = json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}data/plugin/{path}", data, headers)) as answer:
            contents = answer.read()
        return contents if answer.headers["Content-Type"].startswith("image/") else json.loads(contents)

    started = time.monotonic()
    while not ask("scalars/tags") and time.monotonic() - started < 60:
        time.sleep(0.1)
    return ask


@pytest.mark.slow
def test_tensorboard_has_the_scalars_of_the_history(tensorboard, finished):
    history = rows_of(finished[0] / "history.csv")
    times = {f"time/{part}" for part in ("input_wait", "compute", "validation", "saving")}
    tags = set(tensorboard("scalars/tags")["."])
    assert tags == set(history[0]) - {"epoch", "stage"} | times | {"ceiling_images_per_second"}
    for tag in ("learning_rate", "val_accuracy"):
        points = tensorboard(f"scalars/scalars?run=.&tag={tag}")
        assert [step for _, step, _ in points] == [1, 2, 3]
        assert [value for *_, value in points] == pytest.approx([float(row[tag]) for row in history], rel=1e-6)


@pytest.mark.slow
def test_tensorboard_has_the_confusion_matrix_and_every_flag(tensorboard):
    assert tensorboard("images/tags")["."]["confusion_matrix"]["samples"] == 1
    query = tensorboard("images/images?run=.&tag=confusion_matrix&sample=0")[-1]["query"]
    with Image.open(io.BytesIO(tensorboard(f"images/individualImage?{query}"))) as image:
        assert image.width > 300
    text = tensorboard("text/text?run=.&tag=config")[0]["text"]
    assert "--learning_rate" in text
    assert "0.01" in text


@pytest.mark.slow
def test_tensorboards_hparams_tell_the_recipe_and_what_came_of_it(tensorboard, finished):
    question = {
        **{"experimentName": "", "startIndex": 0, "sliceSize": 9},
        **{"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [{"metric": {"tag": "val_accuracy", "group": ""}}]},
    }
    (group,) = tensorboard("hparams/session_groups", question)["sessionGroups"]
    assert set(group["hparams"]) == set(HYPERPARAMETERS)
    assert (group["hparams"]["learning_rate"], group["hparams"]["epochs"]) == (0.01, 3)
    values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert values["val_accuracy"] == pytest.approx(float(rows_of(finished[0] / "history.csv")[-1]["val_accuracy"]))


@pytest.mark.slow
def test_the_page_is_drawn_after_every_epoch_but_for_those_that_take_less_than_drawing(tmp_path, monkeypatch):
    job_dir, now, drawings = make_job_dir(tmp_path), [100.0], []

    def draw(*arguments, **options):
        drawings.append(now[0])
        now[0] += 2

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(report, "write", draw)
    display = ReportWriter(str(job_dir), TensorBoard(str(tmp_path / "logs"), Config().as_dict()))
    for _ in range(3):  # epochs of 50 s
        display.after_epoch({"epoch": 1}, {})
        now[0] += 50
    assert len(drawings) == 3
    for _ in range(100):  # of 1 s
        display.after_epoch({"epoch": 1}, {})
        now[0] += 1
    assert len(drawings) <= 3 + 1 + 100 * 0.05 / 2


def test_the_bar_tells_the_time_left_for_epoch_and_job(capsys):
    terminal = ProgressReporter(True, last_stage="all", cost=Cost(0, 1, 0))
    half = EpochTotals(steps=5, loss=3.0, correct=5.0, examples=10.0, seconds=20.0)
    terminal.on_round("head", 1, epochs_left=1, steps=10, totals=half)
    terminal.close()
    assert "epoch 20 s, job over 1 min 00 s left" in capsys.readouterr().err
    terminal.on_round("all", 3, epochs_left=0, steps=10, totals=half)
    terminal.close()
    assert "epoch 20 s, job 20 s left" in capsys.readouterr().err


def test_without_a_terminal_progress_comes_as_plain_lines_now_and_then(caplog, monkeypatch, capsys):
    terminal, now = ProgressReporter(False, last_stage="all", cost=Cost(0, 1, 0)), time.monotonic()
    for seconds in (1, 31, 32, 62):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        with caplog.at_level("INFO", logger="absl"):
            terminal.on_round("all", 2, 0, 10, EpochTotals(steps=4, loss=3.0, correct=5.0, examples=8.0, seconds=4.0))
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch ")]
    assert len(lines) == 2
    assert lines[0] == (
        "epoch 2 (all): step 4 of 10, epoch 6.0 s, job 6.0 s left; loss 0.3750 accuracy 0.6250 2.0 img/s"
    )
    assert capsys.readouterr().err.count("\r") == 0


@pytest.mark.parametrize(
    ("flags", "environment", "is_json"),
    [
        ([], {}, False),
        ([], {"CLOUD_ML_PROJECT_ID": "1"}, True),
        ([], {"AIP_MODEL_DIR": "m"}, True),
        (["--log_format=text"], {"CLOUD_ML_PROJECT_ID": "1"}, False),
        (["--log_format=json"], {}, True),
    ],
)
def test_errors_come_in_the_format_of_the_log(flags, environment, is_json):
    answer = run_command("trainer.task", "--data_dir=/no/such", "--job_dir=j", *flags, **environment)
    assert answer.returncode == 2
    (line,) = answer.stderr.splitlines()
    if is_json:
        entry = json.loads(line)
        assert entry["severity"] == "ERROR"
        assert "/no/such does not exist" in entry["message"]
    else:
        assert line.startswith("error: --data_dir=/no/such does not exist")


CRASH = """
import sys, warnings
from absl import flags
from trainer import cli, task
sys.argv = ["crash", "--log_format=json"]
def main(arguments):
    warnings.warn("of Python")
    raise RuntimeError("a line\\nand another")
command.run(main, define_flags=task.define_flags)
"""


def test_a_traceback_and_a_warning_are_one_entry_each_of_the_json_log():
    answer = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    warning, entry = (json.loads(line) for line in answer.stderr.splitlines())
    assert warning["severity"] == "WARNING"
    assert "UserWarning: of Python" in warning["message"]
    assert entry["severity"] == "CRITICAL"
    assert entry["message"].startswith("Traceback")
    assert "RuntimeError: a line\nand another" in entry["message"]


def test_the_model_card_tells_what_was_measured_and_leaves_the_rest_to_people(tmp_path):
    job_dir = make_job_dir(tmp_path)
    model_card.write(str(job_dir))
    card = (job_dir / "model_card.md").read_text()
    assert "16 pictures to train on, 8 to validate, 1 unreadable files left out" in card
    assert "| accuracy | 75.00\u00a0% | 40.9\u00a0% to 92.9\u00a0% |" in card
    assert r"| \<script\>alert(1)\< | 4 | 2 |" in card
    assert "cost 0.08 at 3.5 per machine and hour" in card
    assert "`--batch_size=24`" in card
    assert "licence of the model" in card
    assert card.count(model_card.TO_FILL_IN) >= 6


def test_a_model_card_that_was_filled_in_is_not_written_over(tmp_path):
    job_dir = make_job_dir(tmp_path)
    model_card.write(str(job_dir))
    card = (job_dir / "model_card.md").read_text()
    filled_in = card.replace(model_card.TO_FILL_IN + " licence of the model", "Apache-2.0; ")
    (job_dir / "model_card.md").write_text(filled_in)
    model_card.write(str(job_dir))
    assert (job_dir / "model_card.md").read_text() == filled_in
