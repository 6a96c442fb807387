"""docs/data.md is true: its folders are made, its commands run, and what it says of them is compared."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.data.odd_folder import picture

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLE = re.compile(r"<!-- (table|stops)(?:: (.*?))? -->\n\n((?:(?:    .*)?\n)+)")


class Example(NamedTuple):
    """A folder, a command, and what it says.

    Attributes:
        message: that it stops with; "" if it does not.
        files: with their contents.
        argv: of dreamlora.
        lines: that its table has.
    """

    message: str
    files: dict[str, str]
    argv: list[str]
    lines: list[str]


def examples() -> list[Example]:
    found = []
    for kind, message, text in EXAMPLE.findall(PAGE.read_text(encoding="utf-8")):
        listing, command, *rest = re.split(r"\n\n(?=    )", text.rstrip("\n"))
        lines = [line[4:] for line in rest[0].splitlines()] if rest else []
        assert (kind == "stops") == bool(message) and (kind == "table") == bool(lines)
        found.append(Example(message, _files(listing), shlex.split(command)[1:], lines))
    return found


def _files(listing: str) -> dict[str, str]:
    """Names with their contents; a line that begins with more blanks goes on with the content before it."""
    files: dict[str, str] = {}
    for line in listing.splitlines():
        name, _, content = line[4:].partition("  ")
        if name:
            last = name.strip()
            files[last] = content.strip()
        else:
            files[last] += "\n" + content.strip()
    return files


@pytest.mark.parametrize("example", examples(), ids=lambda example: " ".join(example.argv[:4]))
def test_examples(tmp_path: Path, example: Example) -> None:
    for number, (name, content) in enumerate(example.files.items()):
        if content:
            (tmp_path / name).write_text(content, encoding="utf-8")
        else:
            picture(tmp_path / name, number)
    command = [sys.executable, "-m", "dreamlora", *example.argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
    if example.message:
        assert done.returncode == 2 and done.stderr.startswith(f"error: {example.message}")
        return
    assert done.returncode == 0, done.stderr
    printed = [line.strip() for line in done.stdout.splitlines()]
    plain = [re.sub(r"  +", "  ", line) for line in printed]
    told = [re.sub(r"  +", "  ", line.strip()) for line in example.lines]
    assert [line for line in told if line not in plain] == []
    head, end = next(n for n, line in enumerate(plain) if line.startswith("entry ")), plain.index("")
    table = plain[head + 1 : end]
    assert table == told[: len(table)], "the page leaves an entry out"
    assert end > head


def test_the_page_has_examples_of_both_kinds() -> None:
    assert len([example for example in examples() if example.message]) >= 2
    assert len([example for example in examples() if example.lines]) >= 4


def test_endings_and_names_are_those_of_the_program() -> None:
    from dreamlora.data import entries

    text = PAGE.read_text(encoding="utf-8")
    for ending in (*entries.CAPTION_SUFFIXES, *entries.TABLE_SUFFIXES):
        assert f"`{ending}`" in text, ending
    for name in entries.METADATA_FILES:
        assert f"`{name}`" in text
