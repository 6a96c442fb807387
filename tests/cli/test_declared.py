"""What a dataclass declares, as command lines see it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

import pytest

from dreamlora.cli.declared import options_of, subgroups_of
from dreamlora.config import RunConfig


@dataclass(frozen=True)
class Example:
    """Every kind of option."""

    needed: int
    """A number
    of two lines."""
    mode: Literal["a", "b"] | None = None
    switch: bool = True
    pair: tuple[float, float] = (0.9, 0.999)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Child(Example):
    """Takes over what it does not declare again."""

    switch: bool = False
    """Another text."""
    more: int = 1
    """More."""


OPTIONS = options_of(Example)


def test_options_are_inherited_with_their_help() -> None:
    options = options_of(Child)
    assert list(options) == [*OPTIONS, "more"]
    assert options["needed"] == OPTIONS["needed"]
    assert (options["switch"].help, options["switch"].default) == ("Another text.", False)


def test_help_is_the_docstring_under_the_field() -> None:
    assert OPTIONS["needed"].help == "A number of two lines."
    assert OPTIONS["mode"].help == ""


@pytest.mark.parametrize(
    ("name", "takes", "metavar", "default"),
    [
        ("needed", "a whole number", "INT", str(MISSING)),
        ("mode", "one of a, b", "{a,b}", "None"),
        ("switch", "true or false", "", "on"),
        ("pair", "2 values, each a number", "FLOAT FLOAT", "0.9,0.999"),
        ("names", "any number of values, each a text", "TEXT ...", ""),
    ],
    ids=["needed", "mode", "switch", "pair", "names"],  # MISSING's own text differs from process to process
)
def test_options_in_words(name: str, takes: str, metavar: str, default: str) -> None:
    option = OPTIONS[name]
    assert (option.takes, option.metavar, option.shown_default) == (takes, metavar, default)


@pytest.mark.parametrize(
    ("name", "word", "accepted"),
    [
        ("needed", "3", True),
        ("needed", "3.5", False),
        ("mode", "A", True),
        ("mode", "c", False),
        ("pair", "1e-4", True),
    ],
)
def test_words_are_accepted_by_form(name: str, word: str, accepted: bool) -> None:
    assert OPTIONS[name].accepts(word) is accepted


def test_groups_are_flattened_on_request() -> None:
    assert "rank" in options_of(RunConfig) and "rank" not in options_of(RunConfig, deep=False)
    assert list(subgroups_of(RunConfig)) == ["model", "data", "lora", "optim", "train", "sample", "eval", "encoders"]
