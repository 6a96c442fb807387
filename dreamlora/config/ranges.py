"""Checks of options for ``__post_init__``: a UserError names the flag, what is allowed and what was given.

Options that are None were not given and are passed over. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from dreamlora import registry
from dreamlora.errors import UserError

N = TypeVar("N", int, float)

MOST_CHARACTERS = 10_000
"""Of a caption, a prompt or any other value: text encoders read some hundred tokens, and a tokenizer takes minutes and
gigabytes for megabytes."""


def check_length(text: str, where: str) -> None:
    """Nothing, if ``text`` can be a caption, a prompt or another value.

    Raises:
        UserError: it is too long; the message says where it stands.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{where}: a text of {len(text):,} characters is too long: {MOST_CHARACTERS:,} are the most")


def respell(part: Any, name: str, kind: str) -> None:
    """Put a plug-in's name as the registry spells it."""
    object.__setattr__(part, name, spelled(name, getattr(part, name), kind))


def respell_all(part: Any, name: str, kind: str) -> None:
    """The same of several names."""
    object.__setattr__(part, name, tuple(spelled(name, given, kind) for given in getattr(part, name)))


def spelled(flag: str, name: str, kind: str) -> str:
    """A plug-in's name as the registry spells it; ``flag`` is what it was given for."""
    try:
        return registry.check(kind, name)
    except UserError as error:
        raise UserError(f"--{flag}: {error}") from None


def _fail(part: Any, name: str, allowed: str) -> None:
    raise UserError(f"--{name} must be {allowed} (got {getattr(part, name)})")


def _given(part: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, getattr(part, name)) for name in names if getattr(part, name) is not None]


def folder_names(part: Any, *names: str) -> None:
    """These options can be names of folders, and of projects and runs elsewhere."""
    for name, value in _given(part, names):
        if not 0 < len(value) <= 128 or not value.isprintable() or set(value) & set("/\\#?%:") or not value.strip(". "):
            _fail(part, name, "a name of at most 128 characters, without / \\ # ? % :")


def at_least(part: Any, lowest: float, *names: str) -> None:
    """``lowest <= value < inf`` for these options, where they are no words."""
    for name, value in _given(part, names):
        if isinstance(value, str):
            continue
        if not value >= lowest or value == float("inf"):
            _fail(part, name, f"at least {lowest}")


def above(part: Any, bound: float, *names: str) -> None:
    """``bound < value < inf`` for these options."""
    for name, value in _given(part, names):
        if not bound < value < float("inf"):
            _fail(part, name, f"above {bound}")


def within(part: Any, low: float, high: float, *names: str) -> None:
    """``low <= value < high`` for these options."""
    for name, value in _given(part, names):
        if not low <= value < high:
            _fail(part, name, f"at least {low} and below {high}")


def steps_or_share(part: Any, name: str) -> None:
    """A whole number of steps, kept as an int, or a share of them below 1."""
    value = getattr(part, name)
    if value >= 1 and value % 1:
        _fail(part, name, "a whole number of steps, or below 1 for a share of the run")
    if not value % 1:
        object.__setattr__(part, name, int(value))


def finite(part: Any, *names: str) -> None:
    """A finite number, or a tuple of them."""
    for name, value in _given(part, names):
        for number in value if isinstance(value, tuple) else (value,):
            if not math.isfinite(number):
                raise UserError(f"--{name} must be finite (got {number})")


def short(part: Any, *names: str) -> None:
    """Texts, or tuples of them, that are no longer than a prompt can be."""
    for name, value in _given(part, names):
        for text in value if isinstance(value, tuple) else (value,):
            check_length(text, f"--{name}")


def pairs(part: Any, name: str) -> None:
    """Words that are names and values in turn."""
    words = getattr(part, name)
    if len(words) % 2:
        raise UserError(f"--{name} takes pairs of a name and a value (got {' '.join(words)!r})")


def numbers_by_name(part: Any, name: str, kind: Callable[[str], N], most: float) -> dict[str, N]:
    """Numbers above 0 by the names before them, in their order.

    Args:
        part: with an option of names and numbers in turn.
        name: of the option.
        kind: ``int`` or ``float``.
        most: the largest number.
    """
    pairs(part, name)
    words = getattr(part, name)
    found: dict[str, N] = {}
    for key, word in zip(words[0::2], words[1::2], strict=True):
        try:
            number = kind(word)
        except ValueError:
            number = kind("0")
        if not 0 < number <= most:
            what = "whole number" if kind is int else "number"
            raise UserError(f"--{name}: {key} takes a {what} above 0 and at most {most:g} (got {word!r})")
        if not key.strip(".") or key in found:
            raise UserError(f"--{name}: {key!r} is no name, or was given before: one value for each part of a name")
        found[key] = number
    return found
