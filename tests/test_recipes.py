"""--recipe: the epochs that it decides, and the article's flags."""

import pytest

from tests.support.paths import ROOT
from trainer import config, recipes
from trainer.config import Config


def decide(num_training: int = 1000, num_gpus: int = 0, **flags) -> recipes.Decision:
    return recipes.decide(Config(**flags), num_training=num_training, num_gpus=num_gpus)


def test_auto_trains_the_head_alone_without_a_gpu():
    assert decide().epochs == 0
    assert "no GPU" in decide().reason


def test_auto_fine_tunes_on_a_gpu():
    epochs, reason = decide(2000, num_gpus=1)
    assert epochs == recipes.finetune_epochs(2000, 32) == 8  # 500 steps of 32 images
    assert "1 GPU" in reason


@pytest.mark.parametrize(("num_training", "reason"), [(50, "fewer than 100"), (10_000_000, "would take about")])
def test_auto_does_not_fine_tune_very_few_or_too_many_images(num_training, reason):
    decision = decide(num_training=num_training, num_gpus=1)
    assert decision.epochs == 0
    assert reason in decision.reason


def test_more_gpus_fine_tune_more_images():
    assert decide(num_training=1_000_000, num_gpus=1).epochs == 0
    assert decide(num_training=1_000_000, num_gpus=8).epochs == recipes.MIN_FINETUNE_EPOCHS


def test_the_number_of_epochs_is_bounded():
    assert decide(num_training=32, recipe="finetune").epochs == recipes.MAX_FINETUNE_EPOCHS
    assert decide(num_training=10**7, recipe="finetune").epochs == recipes.MIN_FINETUNE_EPOCHS


def test_head_never_fine_tunes_and_a_flag_overrides_every_recipe():
    assert decide(num_gpus=8, recipe="head").epochs == 0
    for recipe in ("auto", "head", "finetune"):
        assert decide(recipe=recipe, epochs=7) == recipes.Decision(7, "--epochs")


def test_without_a_head_there_is_the_whole_network_to_train():
    assert decide(head_epochs=0).epochs == recipes.finetune_epochs(1000, 32)


def test_the_article_recipe_sets_what_is_not_given():
    values = recipes.with_recipe({**config.DEFAULTS, "recipe": "article", "epochs": 3}, given=["recipe", "epochs"])
    assert values["epochs"] == 3
    assert (values["head"], values["monitor"], values["learning_rate"]) == ("flatten", "first_val_accuracy", 1e-4)
    assert recipes.with_recipe(dict(config.DEFAULTS), given=[]) == config.DEFAULTS


def test_the_flag_file_of_the_article_is_the_recipe_of_that_name():
    lines = (ROOT / "deploy" / "flags" / "article.flags").read_text().splitlines()
    flags = dict(line.removeprefix("--").split("=") for line in lines if line.startswith("--") and "=" in line)
    switches = {line.removeprefix("--"): "True" for line in lines if line.startswith("--") and "=" not in line}
    written = {name: type(config.DEFAULTS[name])(value) for name, value in {**flags, **switches}.items()}
    assert written == recipes.ARTICLE
