"""Formats numbers, names and texts for people, in English or in another language.

The texts in the code are English; spanish.toml has their translations.
"""

import contextlib
import contextvars
import functools
import math
import pathlib
import tomllib
from collections.abc import Iterator

LANGUAGES = ("en", "es")
_language = contextvars.ContextVar("language", default="en")


@contextlib.contextmanager
def in_language(name: str) -> Iterator[None]:
    """Sets the language of the functions of this module, one of LANGUAGES, for the block. Outside of blocks it is English."""
    token = _language.set(name)
    try:
        yield
    finally:
        _language.reset(token)


def language() -> str:
    """The language of the current block."""
    return _language.get()


def translation(text: str) -> str:
    """The text in the language of the block. A text without a translation stays English."""
    return spanish_texts().get(text, text) if language() == "es" else text


@functools.cache
def spanish_texts() -> dict[str, str]:
    """The Spanish text of each English one."""
    return tomllib.loads(pathlib.Path(__file__).with_name("spanish.toml").read_text("utf-8"))


def translate(text: str, **values: object) -> str:
    """The text in the language of the block, with its fields `%(name)s` filled in."""
    return translation(text) % values


def localized(digits: str) -> str:
    """A number in English notation, as in 1,234.5, in the notation of the language.

    Spanish has a decimal comma, and groups the digits of numbers of five or more before the comma by a no-break space
    (Real Academia Española, Ortografía, "números").
    """
    if language() == "en":
        return digits
    whole, point, decimals = digits.partition(".")
    whole = whole.replace(",", "\u00a0" if len(whole.lstrip("-\u2212")) > 5 else "")
    return whole + point.replace(".", ",") + decimals


def number(value: int) -> str:
    """A count, as in `12,345`."""
    return localized(f"{value:,}")


def decimal(value: float, digits: int) -> str:
    """A number with `digits` decimals, as in `1,234.5`."""
    return localized(f"{value:,.{digits}f}")


def general(value: float, digits: int) -> str:
    """A number with `digits` significant digits, as in `0.0012` or `1e-05`."""
    return localized(f"{value:.{digits}g}")


def percent(fraction: float | None, digits: int = 0) -> str:
    """A fraction as `12 %`, with a no-break space and a minus sign; an en dash for None."""
    if fraction is None:
        return "\u2013"
    return f"{localized(f'{100 * fraction:.{digits}f}')}\u00a0%".replace("-", "\u2212")


def share(part: float, total: int) -> str:
    """`part` of `total` as a percentage with as many decimals as the total carries: 96 % of 24, 95.8 % of 240."""
    return percent(part / total, max(0, math.ceil(math.log10(total)) - 2)) if total else percent(None)


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 9.95:
        return f"{decimal(seconds, 1)} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def shorten(name: str, length: int) -> str:
    """At most `length` characters of a name, without its middle: the names of many classes differ at either end."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[len(name) - (length - 1) // 2 :]}"
