"""Flags and Config say the same, and what contradicts itself is told before anything starts."""

import dataclasses
import importlib.util
import math

import pytest

from tests.support.trainer_flags import flags_of
from trainer import config, task
from trainer.config import Config
from trainer.errors import UserError


def test_every_flag_is_a_field_of_config_with_the_same_default():
    values = flags_of(task.define_flags)
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    assert fields.pop("verbosity") == 0  # absl's own flag; trainer.command gives it this default
    assert {name: values[name].default for name in values} == fields


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 31}, "image_size is 31, but ResNet50 shrinks its input 32 times: pass 32 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan: pass a finite number"),
        ({"head_learning_rate": math.inf}, "head_learning_rate is inf"),
        ({"validation_split": 1.0}, "validation_split is 1.0"),
        ({"head_epochs": 0, "epochs": 0}, "both 0"),
        ({"weights": "none"}, "--weights=none with --head_epochs=15"),
        ({"warmup_epochs": 20.0}, "longer than a stage"),
        *(({"profile_steps": text}, f"profile_steps is '{text}'") for text in ("5", "0,3", "4,3", "a,b", "1,2,3")),
    ],
)
def test_what_cannot_work_is_told_with_what_came_and_what_to_do(changed, message):
    with pytest.raises(UserError, match=message):
        Config(**changed)


def test_changes_names_what_makes_another_run_and_lets_the_rest_pass():
    before = Config().as_dict()
    now = Config(learning_rate=0.5, epochs=7, checkpoint_secs=9).as_dict()
    assert config.changes(before, now) == ["learning_rate: 3e-07 -> 0.5"]


def test_every_field_that_may_change_is_a_field():
    assert set(config.DEFAULTS) >= config.MAY_CHANGE_ON_RESUME


VERTEX = {
    "AIP_MODEL_DIR": "gs://bucket/base/model/",
    "AIP_CHECKPOINT_DIR": "gs://bucket/base/checkpoints/",
    "AIP_TENSORBOARD_LOG_DIR": "gs://bucket/base/logs/",
}


def test_paths_come_from_vertex_where_no_flag_gives_them():
    settings = task.with_environment(Config(data_dir="d"), VERTEX)
    assert settings.job_dir == "gs://bucket/base"
    assert settings.model_dir == "gs://bucket/base/model"
    assert settings.tensorboard_dir == "gs://bucket/base/logs"


def test_flags_win_over_vertex_and_the_rest_lies_below_job_dir():
    settings = task.with_environment(Config(data_dir="d", job_dir="j/", model_dir="m"), VERTEX)
    assert (settings.job_dir, settings.model_dir) == ("j", "m")
    settings = task.with_environment(Config(data_dir="d", job_dir="j"), {})
    assert (settings.model_dir, settings.tensorboard_dir) == ("j/saved_model", "j/logs")


def test_pictures_without_a_job_dir_are_an_error_and_the_demo_needs_neither():
    with pytest.raises(UserError, match="--job_dir is not set"):
        task.with_environment(Config(data_dir="d"), {})
    assert task.with_environment(Config(), {}).job_dir == "demo_job"


def test_formats_that_there_are_not_are_refused():
    assert Config(export_formats="saved_model,onnx").export_formats == "saved_model,onnx"
    for formats in ("coreml", "", "tflite,", "tflite onnx"):
        with pytest.raises(UserError, match="export_formats"):
            Config(export_formats=formats)


def test_a_format_whose_packages_are_missing_is_refused_before_anything_is_done(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else find_spec(name))
    settings = Config(data_dir="nowhere", job_dir=str(tmp_path / "job"), export_formats="tflite,onnx")
    with pytest.raises(UserError, match="onnx takes packages that are not installed \\(tf2onnx\\): pip install"):
        task.run(settings)
    assert not (tmp_path / "job").exists()


def test_a_run_that_ended_before_its_first_save_stands_in_nobodys_way(tmp_path):
    """Such as one whose weights could not be downloaded: the flag that mends it is another flag."""
    job = Config(job_dir=str(tmp_path), weights="w.h5")
    before = {"flags": {**job.as_dict(), "weights": "imagenet"}, "fingerprint": "of other pictures"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "features-0123456789abcdef-000000000.npz").touch()
    task._check_same_run(job, before, "of these")
    for name in ("checkpoints/000001.npz", "checkpoints/000001.npz.damaged", "best.weights.h5", "metrics.json"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=r"weights: imagenet -> w\.h5"):
            task._check_same_run(job, before, "of these")
        (tmp_path / name).unlink()
