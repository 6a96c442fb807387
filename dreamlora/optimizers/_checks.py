"""Checks of ranges and types; without torch, so that wrong flags fail at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

MOST_NS_STEPS = 99
"""Newton-Schulz iterations that torch's Muon takes; it refuses more, though at the first step only."""

Kind = TypeVar("Kind")


def at_least_zero(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number >= 0 (tensors of one element included)."""
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name}: got {value!r}, must be a finite number >= 0")


def above_zero(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number > 0."""
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name}: got {value!r}, must be a finite number > 0")


def fraction(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is in [0, 1)."""
    if not _is_fraction(value):
        raise ValueError(f"{name}: got {value!r}, must be in [0, 1)")


def two_fractions(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a pair of numbers in [0, 1)."""
    if not (isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_fraction, value))):
        raise ValueError(f"{name}: got {value!r}, must be two numbers in [0, 1)")


def all_finite(name: str, values: Any) -> None:
    """Raise ValueError unless ``values`` are finite numbers."""
    if not (isinstance(values, tuple | list) and all(map(_is_finite, values))):
        raise ValueError(f"{name}: got {values!r}, must be finite numbers")


def whole_number(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Raise ValueError unless ``value`` is an integer from ``least`` to ``most``."""
    if isinstance(value, bool) or not (isinstance(value, int) and least <= value <= most):
        upwards = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}: got {value!r}, must be a whole number {upwards}")


def switch(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False: "false" would be true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, must be True or False")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is among ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, must be one of {', '.join(choices)}")


def of_kind(where: str, value: Any, kind: type, expected: str) -> None:
    """Raise TypeError unless ``value`` is of a type."""
    if not isinstance(value, kind):
        raise TypeError(f"{where}: got {type(value).__name__}, must be {expected}")


def all_of_kind(where: str, values: Any, kind: type[Kind], expected: str) -> list[Kind]:
    """Values of a type, from several or from one alone; TypeError for what is neither."""
    if isinstance(values, kind):
        return [values]
    of_kind(where, values, Iterable, expected)
    found = list(values)
    for other in (value for value in found if not isinstance(value, kind)):
        raise TypeError(f"{where}: got {type(values).__name__} of {type(other).__name__}, must be {expected}")
    return found


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number, or a tensor of one."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no number, or a tensor of several
        return False


def _is_fraction(value: Any) -> bool:
    return _is_finite(value) and bool(0 <= value < 1)
