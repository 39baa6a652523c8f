"""The configuration of an earlier run, which its config.json holds, against that of this one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer import config
from trainer.config import Config


def with_earlier_defaults(settings: Config, earlier: dict[str, Any]) -> Config:
    """The flags of a resumed run: those at their default have the default of the version that began it.

    `earlier` is the value of its config.json. A flag that this version added keeps its default.
    """
    flags, defaults = _with_augment_names(earlier["flags"]), _with_augment_names(earlier["defaults"])
    return dataclasses.replace(
        settings,
        **{
            name: flags[name]
            for name, default in config.DEFAULTS.items()
            if name in flags and getattr(settings, name) == default and flags[name] == defaults.get(name)
        },
    )


def _with_augment_names(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "augment": augment_name(values["augment"])}


def augment_name(value: str | bool) -> str:
    """The value of --augment; that of an earlier version was a bool."""
    return config.AUGMENT_SWITCH.get(str(value).lower(), str(value))


def recorded(flags: Mapping[str, Any], name: str) -> Any:
    """The flag `name` among the flags in a config.json. A run from before the flag existed did what its default does."""
    return flags.get(name, config.DEFAULTS[name])


def changes(before: dict, now: dict) -> list[str]:
    """Fields of two Config.as_dict() that differ and make it another run, each as `name: before -> now`.

    A field that an earlier version did not have counts as unchanged while it has its default.
    """
    before = _with_augment_names(before)
    return [
        f"{name}: {recorded(before, name)} -> {now[name]}"
        for name in now
        if name not in config.MAY_CHANGE_ON_RESUME and recorded(before, name) != now[name]
    ]


def is_valid_type(name: str, value: Any) -> bool:
    """Whether a value from a config.json has the type of the flag `name`; any has that of a flag which does not exist."""
    default = config.DEFAULTS.get(name, value)
    if name == "augment":  # a bool in earlier versions
        return isinstance(value, str | bool)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (float, int) if isinstance(default, float) else type(default))
