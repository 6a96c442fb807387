"""How numbers are written: one way in sentences, tables, pages and terminals. Needs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

MINUS = "\N{MINUS SIGN}"
NONE = "–"
"""Stands where there is no number."""
MOST = 3.4e38
"""No result of a run is larger, for they come from 32-bit floats; what is could not be squared, or drawn."""
_UNIT = "\N{NARROW NO-BREAK SPACE}%"


def value_of(number: Any) -> float | None:
    """A number, or what stands for one in JSON: "inf" and "-inf" are infinite, null and NaN are None.

    Beyond ``MOST`` it is infinite.
    """
    if number is None or (isinstance(number, float) and math.isnan(number)):
        return None
    value = float(number)
    return value if abs(value) <= MOST else math.copysign(math.inf, value)


def loss(entry: Any) -> str:
    """A loss with four significant digits."""
    value = value_of(entry)
    return NONE if value is None else "∞" if math.isinf(value) else f"{value:#.4g}"


def score(value: float) -> str:
    """A value of an image metric, or a difference of losses, which may be negative: four decimals."""
    return f"{value:.4f}".replace("-", MINUS)


def percent(entry: Any) -> str:
    """A signed percentage with two or three digits: ``−2.1 %``."""
    value = value_of(entry)
    if value is None:
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    digits = 2 if abs(value) < 1 else 1 if abs(value) < 100 else 0
    return f"{value:+.{digits}f}{_UNIT}".replace("-", MINUS)


def size_in_percent(entry: Any) -> str:
    """A percentage that is never negative, without a sign."""
    return percent(entry).removeprefix("+")


def change(now: float, before: float) -> str:
    """How far a loss lies from another, in percent of that one."""
    return percent(100 * (now / before - 1))


def amount(entry: Any) -> str:
    """A number with three significant digits, whole from 100 on."""
    value = value_of(entry)
    if value is None:
        return NONE
    if math.isinf(value):
        return "never"
    return (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}").replace("-", MINUS)


def rate(entry: Any) -> str:
    """A learning rate."""
    value = value_of(entry)
    return NONE if value is None else f"{value:.3g}".replace("-0", "-")


def interval(estimate: Mapping[str, Any], write: Callable[[Any], str] = percent) -> str:
    """``−2.1 % [−3.0, −1.2]``, without brackets where there is no interval."""
    if value_of(estimate["low"]) is None:
        return write(estimate["mean"])
    low, high = (write(estimate[end]).removesuffix(_UNIT) for end in ("low", "high"))
    return f"{write(estimate['mean'])} [{low}, {high}]"


def spread(summary: Mapping[str, Any], write: Callable[[Any], str] = loss) -> str:
    """``0.4012 [0.3990, 0.4100]``: median, smallest and largest."""
    if value_of(summary["median"]) is None:
        return NONE
    if summary["n"] < 2 or summary["min"] == summary["max"]:
        return write(summary["median"])
    return f"{write(summary['median'])} [{write(summary['min'])}, {write(summary['max'])}]"


def gibibytes(size: float) -> str:
    """Such as "3.2 GiB", "14 MiB"."""
    for unit, step in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB" if size >= 2**10 else f"{size:.0f} bytes"
