"""Files of rows, one JSON object per line: appended so that a kill spoils no other row, read as far as rows fit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlora.files import open_at_end, writing
from dreamlora.reading import Schema, UnreadableError, read_lines, tell_once

MOST_ROWS = 10**6
"""That are read of a file: more would take gigabytes. A run of 100,000 steps logs half as many."""
_NAMED = 5


def append_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows, on lines of their own: a kill may have left half a line, which would spoil the next row too.

    Raises:
        WriteError: the system refused.
    """
    with writing(file), open_at_end(file) as target:
        if target.tell():
            target.seek(-1, os.SEEK_END)
            if target.read(1) != b"\n":
                target.write(b"\n")
        target.write(lines_of(rows).encode())


def lines_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as text; numbers must be finite."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def read_jsonl(file: Path, schema: Schema, inside: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a file that fit; none if it is missing. What is left out is told once.

    Args:
        file: to read.
        schema: of a row.
        inside: folder that no link may lead out of.
    """
    rows, damage = rows_and_damage(file, schema, inside)
    if damage:
        tell_once(damage)
    return rows


def rows_and_damage(file: Path, schema: Schema, inside: Path | None = None) -> tuple[list[dict[str, Any]], str]:
    """The rows that fit, and a sentence about all else; "" if there is nothing else.

    Blank lines are not counted, nor is the beginning of a last line, which is what a kill leaves.
    """
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    try:
        for number, line in read_lines(file, inside):
            row = None if line is None else _row(line, schema)
            if row is not None:
                rows.append(row)
            elif line is None or (line.strip() and line.endswith(b"\n")):
                damaged.append(number)
            if len(rows) + len(damaged) >= MOST_ROWS:
                return rows, f"{file}: the lines from {number + 1:,} on are left out"
    except FileNotFoundError:
        return [], ""
    except UnreadableError as error:
        return rows, f"{error}. What it held is left out"
    return rows, _sentence(file, damaged) if damaged else ""


def _row(line: bytes, schema: Schema) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = schema.check_line(line)
    except ValueError:  # also of bytes that are no UTF-8
        return None
    return {name: finite(value) for name, value in row.items()}


def finite(value: Any) -> Any:
    """None for a number that is not finite, which is no JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sentence(file: Path, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"{file}: line {numbers[0]} cannot be read and is left out"
    named = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"{file}: lines {named}{more} cannot be read and are left out"
