"""Checks of the options of a training loss that are more than ranges. No torch here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dreamlora.config.ranges import finite
from dreamlora.errors import UserError
from dreamlora.reading import utf8_text

DENSITIES = ("logit_normal", "mode")
"""Values of ``--weighting_scheme`` that are no weightings."""
BETA = 0.05, 100.0
"""From where to where the parameters of a beta distribution are: beyond, all times are one."""
MOST_SHARES = 10_000
TABLE_BYTES = 1_000_000


def sampling_of(train: Any) -> str | None:
    """The density of times that options name (``config.Train``); None: the family's own."""
    scheme = train.weighting_scheme
    if train.timestep_sampling is None and scheme != "none":
        return scheme if scheme in DENSITIES else "uniform"
    named: str | None = train.timestep_sampling
    return named


def check_times(train: Any) -> None:
    """Options of times as they count: a file of shares is read.

    Raises:
        UserError: they are out of range, or do not go together; or the file cannot be read, or holds something else.
    """
    scheme, sampling = train.weighting_scheme, train.timestep_sampling
    if sampling and scheme in DENSITIES and sampling != scheme:
        raise UserError(
            f"--weighting_scheme {scheme} draws times by that density, and --timestep_sampling {sampling} by another: "
            "give one of them"
        )
    finite(train, "timestep_beta")
    if not all(BETA[0] <= number <= BETA[1] for number in train.timestep_beta):
        given = " ".join(f"{number:g}" for number in train.timestep_beta)
        raise UserError(f"--timestep_beta must be two numbers from {BETA[0]:g} to {BETA[1]:g} (got {given})")
    if sampling == "table" and not train.timestep_table:
        raise UserError("--timestep_sampling table needs --timestep_table, with the shares or a file of them")
    if train.timestep_table:
        object.__setattr__(train, "timestep_table", _shares(train.timestep_table))
    if train.timestep_shift is not None:
        object.__setattr__(train, "timestep_shift", _shift(train.timestep_shift))
    if not 0 <= train.unmasked_weight <= 1:
        raise UserError(f"--unmasked_weight must be from 0 to 1 (got {train.unmasked_weight})")


def _shift(text: str) -> str:
    """A name, or a number as it is written shortest: a saved run and a flag are compared as texts."""
    if text in ("none", "scheduler"):
        return text
    number = _number(text)
    if number is None or not 0 < number < math.inf:
        raise UserError(f"--timestep_shift must be none, scheduler or a number above 0 (got {text!r})")
    return f"{number:g}"


def _shares(words: tuple[str, ...]) -> tuple[str, ...]:
    """The numbers of a table, those of its file if one is named."""
    where = "--timestep_table"
    if len(words) == 1 and _number(words[0]) is None:
        file = Path(words[0])
        where = f"{where} {file}"
        try:
            words = tuple(utf8_text(file, TABLE_BYTES).replace(",", " ").split())
        except FileNotFoundError:
            raise UserError(f"{where}: there is no such file, and it is no list of numbers") from None
    numbers = [_number(word) for word in words]
    wrong = next((word for word, number in zip(words, numbers, strict=True) if not _is_share(number)), None)
    if wrong is not None:
        raise UserError(f"{where} must hold numbers of at least 0 (got {wrong[:50]!r})")
    if not 2 <= len(words) <= MOST_SHARES or not any(numbers):
        raise UserError(
            f"{where} must hold from 2 to {MOST_SHARES:,} shares, one of them above 0 (got {len(words)}: "
            f"{' '.join(words)[:50]})"
        )
    return tuple(f"{number:.17g}" for number in numbers if number is not None)


def _is_share(number: float | None) -> bool:
    return number is not None and 0 <= number < math.inf


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
