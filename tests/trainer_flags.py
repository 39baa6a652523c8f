"""The trainer's own flags, for tests that hold specs against them."""

from conftest import flags_of

from trainer import config, task
from trainer.config import Config


def parse(arguments: list[str]) -> Config:
    """The Config of `python -m trainer.task ARGUMENTS`. Raises flags.Error, UserError or ValueError, as a job would."""
    values = flags_of(task.define_flags)
    rest = values(["trainer.task", *arguments])[1:]
    unexpanded = [argument for argument in arguments if "$" in argument]
    if rest or unexpanded:
        raise ValueError(f"{rest + unexpanded} are no flags with a value")
    return Config(**{name: values[name].value for name in config.DEFAULTS if name in values})
