"""TensorBoard itself shows the logs of a run."""

import csv
import io
import json
import time
import urllib.request

import pytest
from PIL import Image
from tensorboard import program

from trainer.config import HYPERPARAMETERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def query(finished_job):
    """A function that queries the HTTP interface of a TensorBoard of the logs."""
    board = program.TensorBoard()
    board.configure(argv=["", f"--logdir={finished_job / 'logs'}", "--port=0", "--load_fast=false"])
    address = board.launch()

    def query(path, body=None):
        data, headers = json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}data/plugin/{path}", data, headers)
        with urllib.request.urlopen(request) as response:
            contents = response.read()
        return contents if response.headers["Content-Type"].startswith("image/") else json.loads(contents)

    started = time.monotonic()
    while not query("scalars/tags") and time.monotonic() - started < 60:
        time.sleep(0.1)
    return query


@pytest.fixture(scope="module")
def history(finished_job):
    with open(finished_job / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_scalars_equal_the_history(query, history):
    times = {f"time/{part}" for part in ("input_wait", "compute", "validation", "saving")}
    tags = set(query("scalars/tags")["."])
    assert tags == set(history[0]) - {"epoch", "stage"} | times | {"ceiling_images_per_second"}
    for tag in ("learning_rate", "val_accuracy"):
        points = query(f"scalars/scalars?run=.&tag={tag}")
        assert [step for _, step, _ in points] == [1, 2, 3]
        assert [value for *_, value in points] == pytest.approx([float(row[tag]) for row in history], rel=1e-6)


def test_the_confusion_matrix_is_an_image(query):
    assert query("images/tags")["."]["confusion_matrix"]["samples"] == 1
    arguments = query("images/images?run=.&tag=confusion_matrix&sample=0")[-1]["query"]
    with Image.open(io.BytesIO(query(f"images/individualImage?{arguments}"))) as image:
        assert image.width > 300


def test_every_flag_is_in_the_text(query):
    text = query("text/text?run=.&tag=config")[0]["text"]
    assert "--learning_rate" in text
    assert "0.01" in text


def test_hparams_have_the_recipe_and_the_accuracy(query, history):
    request = {
        "experimentName": "",
        "startIndex": 0,
        "sliceSize": 9,
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [{"metric": {"tag": "val_accuracy", "group": ""}}],
    }
    (group,) = query("hparams/session_groups", request)["sessionGroups"]
    assert set(group["hparams"]) == set(HYPERPARAMETERS)
    assert (group["hparams"]["learning_rate"], group["hparams"]["epochs"]) == (0.01, 3)
    values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert values["val_accuracy"] == pytest.approx(float(history[-1]["val_accuracy"]))
