"""How numbers, times and sizes are written in messages, tables and reports."""

from __future__ import annotations

import math


def number(value: float | None, form: str) -> str:
    """A number as text, '-' where there is none."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def order_name(order: int) -> str:
    """An order of force constants; pair functions of the true distance have the number 0."""
    return str(order) if order else "pairs"


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def to_go(seconds: float | None, before: str = "") -> str:
    """'about 12 min to go', after a word on what; nothing where the time is not known, or over."""
    return "" if seconds is None or seconds < 0.5 else f"{before}about {duration(seconds)} to go"


def wall_time(seconds: float) -> str:
    """A time with one decimal, for tables of what took how long: 40.2 s, 12.5 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def countdown(seconds: float) -> str:
    """A time that is seen to pass: 40 s, 12 min 05 s, 3 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """A number of bytes: 640 bytes, 12 kB, 3 MB, 1.5 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def counted(count: int, what: str) -> str:
    """'1 structure', '12 structures': a number with its noun, in the plural where it needs it."""
    return f"{count} {what}{'' if count == 1 else 's'}"
