from trainer import earlier_runs
from trainer.config import Config


def test_a_run_from_before_a_flag_is_a_run_with_its_default():
    before = {name: value for name, value in Config().as_dict().items() if name not in ("resize", "backbone")}
    assert earlier_runs.changes(before, Config().as_dict()) == []
    assert earlier_runs.changes(before, Config(resize="pad", backbone="ConvNeXtTiny").as_dict()) == [
        "resize: stretch -> pad",
        "backbone: ResNet50 -> ConvNeXtTiny",
    ]


def test_changes_lists_what_makes_another_run():
    before = Config().as_dict()
    now = Config(learning_rate=0.5, epochs=7, checkpoint_secs=9).as_dict()
    assert earlier_runs.changes(before, now) == ["learning_rate: 0.0003 -> 0.5"]


def test_a_run_of_an_earlier_version_keeps_the_defaults_that_it_began_with():
    earlier = {
        "flags": {"augment": True, "learning_rate": 3e-7, "dropout": 0.4, "epochs": 2},
        "defaults": {"augment": True, "learning_rate": 3e-7, "dropout": 0.2, "epochs": 0},
    }
    resumed = earlier_runs.with_earlier_defaults(Config(dropout=0.4, epochs=2), earlier)
    assert resumed == Config(learning_rate=3e-7, dropout=0.4, epochs=2)
    assert earlier_runs.changes(earlier["flags"], resumed.as_dict()) == []
    assert earlier_runs.with_earlier_defaults(Config(learning_rate=0.1), earlier).learning_rate == 0.1
