"""docs/families.md says of every family what its module says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest

from dreamlora import registry
from dreamlora.interfaces import Family

DOCUMENT = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
TABLES = ("Which models", "How they are trained", "How samples are drawn")


def rows(title: str) -> dict[str, list[str]]:
    """The cells of the table under a heading, by families."""
    section = DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = (line.strip("|").split("|") for line in section.splitlines() if line.startswith("|"))
    named = ((re.match(r"\[?`(\w+)`", cells[0].strip()), cells) for cells in lines)
    return {name.group(1): [cell.strip() for cell in cells[1:]] for name, cells in named if name}


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\b\d+\b", text)]


@pytest.mark.parametrize("title", TABLES)
def test_every_table_has_all_families(title: str) -> None:
    assert sorted(rows(title)) == sorted(registry.names("families"))


@pytest.mark.parametrize("name", registry.names("families"))
def test_rows_say_what_the_module_says(name: str) -> None:
    family = cast(Family, registry.load("families", name))
    _, pipelines = rows("Which models")[name]
    assert pipelines == ", ".join(family.PIPELINES)
    *_, prompts, encoders, sides = rows("How they are trained")[name]
    assert int(sides) == family.SIDE_MULTIPLE
    assert (encoders == "none") == (not family.TEXT_ENCODERS) and ("both" in encoders) == (
        len(family.TEXT_ENCODERS) == 2
    )
    assert family.PROMPT_DEFAULT is None or numbers(prompts)[0] == family.PROMPT_DEFAULT
    ignored = rows("How samples are drawn")[name][-1] == "not used"
    assert ignored == ("negative_prompt" not in family.OWN_OPTIONS)


@pytest.mark.parametrize("name", registry.names("families"))
def test_every_family_has_a_section_that_says_what_was_not_checked(name: str) -> None:
    section = DOCUMENT.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    heads = [line.strip("|").partition("|")[0].strip() for line in section.splitlines() if line.startswith("|")]
    assert {"recipe", "prompts", "LoRA", "checked besides", "not checked"} <= set(heads)
