"""What a command found, on a terminal: as tables, or as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


def in_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows with columns of one width; the last of a row may be longer."""
    columns = range(max(map(len, rows)) - 1)
    widths = [max(len(row[column]) for row in rows if len(row) > column + 1) for column in columns]
    for row in rows:
        begin = "".join(f"  {cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=False))
        yield f"{begin}  {row[-1]}".rstrip()


def tell(found: Any, lines_of: Callable[[Any], Iterable[str]], *, as_json: bool) -> None:
    """Print what was found: in lines, or with ``--json`` as it is."""
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines_of(found))
