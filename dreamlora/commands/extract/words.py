"""The text that ``dreamlora extract`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.commands.columns import in_columns
from dreamlora.commands.kept_layers import table_of
from dreamlora.commands.lora_files import megabytes
from dreamlora.escapes import one_line

_MOST = 20
"""Tensors that no LoRA can hold, of which the largest changes are shown."""


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines, from ``extract.extract``."""
    yield from (one_line(line) for line in _lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield from table_of(found)
    if found["equal_layers"]:
        yield f"{found['equal_layers']} layers do not differ, and are left out"
    others = sorted(found["not_held"], key=lambda other: -other["relative_change"])
    if others:
        numbers = sum(other["numbers"] for other in others)
        yield f"not in the LoRA, as none can hold it: {len(others)} tensors with {numbers:,} numbers that differ"
        rows = [(other["tensor"], f"{other['numbers']:,}", f"{other['relative_change']:.2g}") for other in others]
        yield from in_columns([("tensor", "numbers", "relative change"), *rows[:_MOST]])
        if len(others) > _MOST:
            yield f"  and {len(others) - _MOST} more, with smaller changes: --json has all"
    if not found["all_compared"]:
        yield "norms and biases were not compared, as one of the models is a folder and the other a single file"
    what = f"{found['tuned']} - {found['base']}"
    yield f"{found['output']}: {what}, {megabytes(found['bytes'])}, format {found['format']}"
