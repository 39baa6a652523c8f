"""Formats numbers and names for people."""


def percent(fraction: float | None, digits: int = 0) -> str:
    """A fraction as `12 %`, with a no-break space and a minus sign; an en dash for None."""
    return "\u2013" if fraction is None else f"{100 * fraction:.{digits}f}\u00a0%".replace("-", "\u2212")


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def shorten(name: str, length: int) -> str:
    """At most `length` characters of a name, without its middle: the names of many classes differ at either end."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[len(name) - (length - 1) // 2 :]}"
