"""Range checks of options; without torch, so that wrong flags fail at once."""

from __future__ import annotations

import math
from typing import Any


def at_least_zero(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number >= 0 (tensors of one element included)."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: got {value}, must be a finite number >= 0")


def above_zero(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, must be a finite number > 0")


def fraction(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, must be in [0, 1)")


def two_fractions(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a pair of numbers in [0, 1)."""
    if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
        raise ValueError(f"{name}: got {value}, must be two numbers in [0, 1)")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is among ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, must be one of {', '.join(choices)}")


def whole_number(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless ``value`` is a whole number from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value}, must be a whole number >= {least}")
