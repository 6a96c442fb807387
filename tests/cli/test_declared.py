"""What a dataclass declares, as command lines see it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal

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
    scales: tuple[float, ...] = (1.0, 0.5)
    place: Path | None = None
    rate: float | Literal["auto"] | None = None


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
        ("scales", "any number of values, each a number", "FLOAT ...", "1.0 0.5"),
        ("place", "a path", "PATH", "None"),
        ("rate", "a number or auto", "{FLOAT,auto}", "None"),
    ],
    # MISSING's own text differs from process to process
    ids=["needed", "mode", "switch", "pair", "names", "scales", "place", "rate"],
)
def test_options_in_words(name: str, takes: str, metavar: str, default: str) -> None:
    option = OPTIONS[name]
    assert (option.takes, option.metavar, option.default_text) == (takes, metavar, default)


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("needed", "3", 3),
        ("needed", "-3", -3),
        ("mode", "A", "a"),
        ("switch", "False", False),
        ("pair", "1e-4 -.5", (1e-4, -0.5)),
        ("pair", "0.8,0.9", (0.8, 0.9)),
        ("names", "a b a", ("a", "b", "a")),
        ("names", "", ()),
        ("place", "a/b", Path("a/b")),
        ("place", "None", Path("None")),
        ("rate", "Auto", "auto"),
        ("rate", "1", 1.0),
    ],
)
def test_words_become_values(name: str, words: str, value: Any) -> None:
    read = OPTIONS[name].read(words.split())
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("needed", [], "needs a value: a whole number"),
        ("needed", ["3.5"], r"takes a whole number \(got '3.5'\)"),
        ("needed", ["3.0"], r"takes a whole number \(got '3.0'\)"),
        ("needed", [""], r"takes a whole number \(got ''\)"),
        ("needed", ["1", "2"], r"takes one value \(got 2: 1 2\); put quotes round a text with spaces"),
        ("mode", ["c"], r"takes one of a, b \(got 'c'\)"),
        ("switch", ["1"], r"takes true or false \(got '1'\)"),
        ("pair", ["1"], r"takes 2 values \(got 1: 1\)"),
        ("pair", ["1", "x"], r"takes 2 values, each a number \(got 'x'\)"),
        ("place", [""], r"takes a path \(got ''\)"),
        ("rate", ["automatic"], r"takes a number or auto \(got 'automatic'\)"),
    ],
)
def test_words_that_do_not_fit_are_refused(name: str, words: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        OPTIONS[name].read(words)


@pytest.mark.parametrize(
    "annotation",
    [
        dict[str, int],
        int | str,
        tuple[int, float],
        Literal[1, 2],
        list[int],
        tuple[()],
        int | str | None,
        Literal["a"] | str,
    ],
)
def test_a_type_that_no_word_can_stand_for_fails_at_once(annotation: Any) -> None:
    odd = make_dataclass("Odd", [("name", annotation)])
    odd.__module__ = __name__  # its source, for the texts
    with pytest.raises(TypeError, match="name: no word of a command line can become a"):
        options_of(odd)


def test_groups_are_flattened_on_request() -> None:
    assert "rank" in options_of(RunConfig) and "rank" not in options_of(RunConfig, deep=False)
    groups = ["model", "data", "lora", "tokens", "optim", "train", "sample", "eval", "encoders", "about"]
    assert list(subgroups_of(RunConfig)) == groups
