"""Help texts: the page of ``--help``, and the list of a plug-in's settings."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING
from typing import Any

from dreamlora import registry
from dreamlora.cli.declared import Option, options_of, subgroups_of

WIDEST = 120
"""Columns of a page on a wider terminal: longer lines are hard to read."""

_UNBROKEN = "\u00a0"
"""A space at which ``wrapped`` breaks no line."""

_GENERAL = {
    "--config FILE": "YAML file with flags, in groups or flat; flags on the command line win. May be given several "
    "times.",
    "-h, --help": "Show this page and exit.",
}


def page(
    config_class: type[Any],
    name: str,
    positional: str | None = None,
    width: int | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> str:
    """The text of ``--help``: usage, what the command does, then the options, group by group, as they are declared.

    Args:
        name: of the command, such as "dreamlora sample".
        positional: the flag whose name may be left out.
        width: in columns; by default that of the terminal, and 80 if there is none.
        elsewhere: by option, where another default holds, and which.
    """
    more = elsewhere or {}
    width = min(width or shutil.get_terminal_size().columns, WIDEST)
    offered = options_of(config_class)
    bare = f" {offered[positional].metavar}" if positional else ""
    own = [offered[option] for option in options_of(config_class, deep=False)]
    tables = {"options:": _rows(own, more) | _GENERAL}
    for group, its_class in subgroups_of(config_class).items():
        options = [offered[option] for option in options_of(its_class) if option in offered]
        tables[f"{group} options: {_first_paragraph(its_class)}"] = _rows(options, more)
    lines = [f"usage: {name}{bare} [FLAGS]", "", *wrapped(_first_paragraph(config_class), width)]
    longest = max(len(flag) for rows in tables.values() for flag in rows)
    column = min(width * 3 // 10, longest + 4)
    for heading, rows in tables.items():
        lines += ["", *wrapped(heading, width), *_table(rows, column, width)]
    return "\n".join(lines) + "\n"


def settings(options: Mapping[str, Option]) -> str:
    """A plug-in's settings, for the message that one of them does not exist."""
    if not options:
        return "\nIt has no settings."
    lines = [f"  {name} {option.takes} (default {option.default_text})" for name, option in options.items()]
    texts = [option.help for option in options.values()]
    return "\nIts settings:\n" + "\n".join(f"{line}: {text}" for line, text in zip(lines, texts, strict=True))


def filled(text: str) -> str:
    """A text with the names of the plug-ins in the place of ``{optimizers}``, ``{lora.formats}`` and so on."""
    for kind in ("adapters", "optimizers", "inits", "metrics", "lora.formats"):
        text = text.replace(f"{{{kind}}}", ", ".join(registry.names(kind)))
    return text


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, broken at spaces and after commas; only a longer word is a longer line.

    ``textwrap`` would break at hyphens too, and not within the choices ``{a,b,c}``.
    """
    lines = [""]
    for piece in re.split(r"(?<=[ ,])", text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip().replace(_UNBROKEN, " ") for line in lines]


def _first_paragraph(config_class: type[Any]) -> str:
    """Of the docstring; what follows is for those who read the code."""
    return " ".join((inspect.getdoc(config_class) or "").partition("\n\n")[0].split())


def _rows(options: Iterable[Option], elsewhere: Mapping[str, str]) -> dict[str, str]:
    rows = {}
    for option in options:
        flag, text = _row(option)
        rows[flag] = f"{text} {elsewhere[option.name]}" if option.name in elsewhere else text
    return rows


def _row(option: Option) -> tuple[str, str]:
    """A flag as one types it, and its text."""
    flag = f"--{option.name}, --no_{option.name}" if option.switch else f"--{option.name} {option.metavar}"
    if option.default is MISSING:
        return flag, f"{filled(option.help)} (required)"
    # A default that is decided later, or is empty, needs no words; some texts speak of their default themselves.
    if option.default is None or option.default is False or option.default == () or "Default:" in option.help:
        return flag, filled(option.help)
    return flag, f"{filled(option.help)} (default:{_UNBROKEN}{option.default_text})"


def _table(rows: Mapping[str, str], column: int, width: int) -> Iterator[str]:
    """Flags on the left, texts from ``column`` on; a long flag has lines of its own."""
    for flag, text in rows.items():
        texts = wrapped(text, width - column)
        head = wrapped(flag, width - 2)
        if len(head[-1]) + 4 <= column:
            head[-1] = f"{head[-1]:<{column - 2}}{texts.pop(0)}"
        yield from (f"  {line}" for line in head)
        yield from (" " * column + line for line in texts)
