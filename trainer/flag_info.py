"""What a field of the configuration says about its flag."""

import dataclasses
import math
from typing import Any

from trainer.errors import UserError


@dataclasses.dataclass(frozen=True)
class FlagInfo:
    """What a field of Config says about its flag.

    `at_least` and `at_most` are inclusive bounds, `above` and `below` exclusive ones; `reason` explains a bound.
    `resumable`: a run that continues in its job_dir may change it, since it says where and how, not what.
    `per_worker`: workers may differ in it. `in_readme`: README's table of common flags lists it.
    """

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    reason: str = ""
    resumable: bool = False
    per_worker: bool = False
    in_readme: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises UserError if `value` is not one that the flag `name` takes."""
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} is {value}: pass a finite number.")
        if self.choices and value not in self.choices:
            raise UserError(f"--{name} is {value!r}: pass one of {', '.join(self.choices)}.")
        is_allowed = [
            self.at_least is None or value >= self.at_least,
            self.at_most is None or value <= self.at_most,
            self.above is None or value > self.above,
            self.below is None or value < self.below,
        ]
        if not all(is_allowed):
            because = f"; {self.reason}" if self.reason else ""
            raise UserError(f"--{name} is {value}: pass a number {self._bounds()}{because}.")

    def _bounds(self) -> str:
        bounds = [
            (self.at_least, "of at least {:g}"),
            (self.at_most, "of at most {:g}"),
            (self.above, "above {:g}"),
            (self.below, "below {:g}"),
        ]
        return " and ".join(text.format(bound) for bound, text in bounds if bound is not None)


def flag(default: Any, help_text: str, **info: Any) -> Any:
    """A field of a dataclass that is a flag: its default, its help text, and what else FlagInfo says."""
    return dataclasses.field(default=default, metadata={"flag": FlagInfo(help_text, **info)})
