"""The flags of commands, apart from those of the process that runs the tests."""

import functools

import pytest
from absl import flags

from trainer import recipes, task
from trainer.config import DEFAULTS, Config


def flags_of(define_flags) -> flags.FlagValues:
    """The flags that a command defines."""
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("string", "integer", "float", "boolean", "enum", "list", "flag"):
            define = getattr(flags, f"DEFINE_{kind}")
            patch.setattr(flags, f"DEFINE_{kind}", functools.partial(define, flag_values=values))
        define_flags()
    return values


def parse(arguments: list[str]) -> Config:
    """The Config of `python -m trainer.task ARGUMENTS`. Raises flags.Error, UserError or ValueError, as a job would."""
    values = flags_of(task.define_flags)
    rest = values(["trainer.task", *arguments])[1:]
    unexpanded = [argument for argument in arguments if "$" in argument]
    if rest or unexpanded:
        raise ValueError(f"{rest + unexpanded} are no flags with a value")
    given = [name for name in DEFAULTS if name in values and values[name].present]
    return Config(**recipes.with_recipe({name: values[name].value for name in DEFAULTS if name in values}, given))
