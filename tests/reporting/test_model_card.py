"""The model card has what was measured, and keeps what people filled in."""

import pathlib

import pytest

from tests.support.written_job import make_job_dir
from trainer.artifacts.job_dir import JobDir
from trainer.reporting import model_card


@pytest.fixture
def job_dir(tmp_path):
    return str(make_job_dir(tmp_path))


def test_the_card_has_the_metrics_and_fields_to_fill_in(job_dir):
    model_card.write(job_dir)
    card = pathlib.Path(JobDir(job_dir).model_card).read_text()
    assert "16 training images, 8 validation images, 1 unreadable files skipped" in card
    assert "| accuracy | 75\u00a0% | 41\u00a0% to 93\u00a0% |" in card
    assert r"| \<script\>alert(1)\< | 4 | 2 |" in card
    assert "cost 0.08 at 3.5 per machine and hour" in card
    assert "`--batch_size=24`" in card
    assert "license of the model" in card
    assert card.count(model_card.TO_FILL_IN) >= 6


def test_the_card_has_the_size_and_the_check_of_each_export(job_dir):
    paths = JobDir(job_dir)
    int8 = {"num_bytes": 24_250_336, "max_difference": 0.04, "accuracy": 0.75, "network_accuracy": 0.875, "images": 8}
    exports = {"tflite": {"num_bytes": 93_984_412, "max_difference": 7.2e-07}, "tflite_int8": int8}
    paths.write_metrics({**paths.read_metrics(), "exports": exports})
    model_card.write(job_dir)
    card = pathlib.Path(paths.model_card).read_text()
    assert "| tflite | 94.0 MB | probabilities differ by at most 7.2e-07 from those of the network" in card
    expected = "accuracy 75.00\u00a0% on 8 validation images, 87.50\u00a0% in float32"
    assert f"| tflite_int8 | 24.3 MB | {expected} |" in card


def test_a_card_that_was_filled_in_is_not_overwritten(job_dir):
    model_card.write(job_dir)
    path = pathlib.Path(JobDir(job_dir).model_card)
    filled_in = path.read_text().replace(model_card.TO_FILL_IN + " license of the model", "Apache-2.0; ")
    path.write_text(filled_in)
    model_card.write(job_dir)
    assert path.read_text() == filled_in
