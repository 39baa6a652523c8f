"""Config: its bounds and contradictions, and the flags that are generated from it."""

import dataclasses
import math

import pytest

from tests.support.trainer_flags import flags_of
from trainer import config
from trainer.config import Config
from trainer.errors import UserError


def test_each_field_is_a_flag_with_its_default_and_help():
    values = flags_of(config.define_flags)
    defined = {name: (values[name].default, values[name].help) for name in values}
    expected = {name: (config.DEFAULTS[name], info.help) for name, info in config.FLAG_INFO.items()}
    assert expected.pop("verbosity")[0] == 0  # absl's own flag, to which trainer.cli gives this default
    assert {name: default for name, (default, _) in defined.items()} == {n: d for n, (d, _) in expected.items()}
    for name, (_, help_text) in expected.items():
        assert " ".join(help_text.split()) in " ".join(defined[name][1].split())


def test_every_flag_is_explained():
    assert [name for name, info in config.FLAG_INFO.items() if not info.help] == ["verbosity"]


def test_every_default_is_allowed():
    assert dataclasses.asdict(Config()) == config.DEFAULTS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 31}, "--image_size is 31: pass a number of at least 32; each backbone reduces its input"),
        ({"resize": "squeeze"}, "--resize is 'squeeze': pass one of stretch, pad, crop"),
        ({"backbone": "resnet50"}, "--backbone is 'resnet50': pass one of ResNet50, ResNet101, EfficientNetV2B0"),
        ({"batch_size": 0}, "--batch_size is 0: pass a number of at least 1"),
        ({"learning_rate": 0.0}, "--learning_rate is 0.0: pass a number above 0"),
        ({"learning_rate": math.nan}, "--learning_rate is nan: pass a finite number"),
        ({"head_learning_rate": math.inf}, "--head_learning_rate is inf"),
        ({"validation_split": 1.0}, "--validation_split is 1.0: pass a number above 0 and below 1"),
        ({"dropout": 0.96}, "--dropout is 0.96: pass a number of at least 0 and of at most 0.95"),
        ({"optimizer": "lion"}, "--optimizer is 'lion': pass one of auto, adam, adamw, lamb, sgd"),
        ({"head_epochs": 0, "epochs": 0}, "both 0"),
        ({"head_epochs": 0, "recipe": "head"}, "--recipe=head with --head_epochs=0: nothing would be trained"),
        ({"weights": "none"}, "--weights=none with --head_epochs=-1"),
        ({"warmup_epochs": 20.0, "epochs": 10}, "longer than a stage"),
        ({"head_learning_rate": 0.01}, "--head_learning_rate is 0.01, but the head is fitted without a learning rate"),
        ({"monitor": "accuracy"}, "--monitor is 'accuracy': pass one of auto, val_accuracy"),
        ({"max_cost": 3.0}, "--max_cost is 3.0, but --price_per_hour is not set"),
        ({"profile_steps": "5"}, "--profile_steps is '5'"),
        ({"profile_steps": "0,3"}, "--profile_steps is '0,3'"),
        ({"profile_steps": "4,3"}, "--profile_steps is '4,3'"),
        ({"profile_steps": "a,b"}, "--profile_steps is 'a,b'"),
        ({"profile_steps": "1,2,3"}, "--profile_steps is '1,2,3'"),
        ({"export_formats": "coreml"}, "--export_formats=coreml names 'coreml'"),
        ({"export_formats": ""}, "--export_formats= names ''"),
        ({"export_formats": "tflite,"}, "--export_formats=tflite, names ''"),
        (
            {"export_formats": "tflite,onnx", "backbone": "ConvNeXtTiny"},
            "with --backbone=ConvNeXtTiny: tf2onnx converts",
        ),
        ({"export_formats": "tflite onnx"}, "names 'tflite onnx'"),
    ],
)
def test_a_value_that_cannot_work_is_refused(changed, message):
    with pytest.raises(UserError) as error:
        Config(**changed)
    assert message in str(error.value)


def test_epochs_override_the_recipe_head():
    assert Config(head_epochs=0, recipe="head", epochs=5).epochs == 5


def test_profile_range_is_the_first_and_last_step():
    assert Config(profile_steps="10,20").profile_range() == (10, 20)
    assert Config().profile_range() is None


def test_the_monitored_metric_follows_the_class_weights():
    assert Config().monitored_metric == "val_accuracy"
    assert Config(class_weight="balanced").monitored_metric == "balanced_accuracy"
    assert Config(class_weight="balanced", monitor="val_loss").monitored_metric == "val_loss"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("--augment", "basic"), ("--noaugment", "none"), ("--augment=strong", "strong"), ("--augment=none", "none")],
)
def test_augment_is_still_a_switch_too(argument, value):
    values = flags_of(config.define_flags)
    values(["program", argument])
    assert values["augment"].value == value
