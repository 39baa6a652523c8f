"""The flags of commands, apart from those of the process that runs the tests."""

import inspect

import pytest
from absl import flags

from trainer import recipes, task
from trainer.config import DEFAULTS, Config


def flags_of(define_flags) -> flags.FlagValues:
    """The flags that a command defines."""
    values = flags.FlagValues()
    if inspect.signature(define_flags).parameters:
        define_flags(values)
        return values

    def define_here(define):
        return lambda *arguments, **keywords: define(*arguments, **{**keywords, "flag_values": values})

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in dir(flags) if name.startswith("DEFINE_")]:
            patch.setattr(flags, name, define_here(getattr(flags, name)))
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
