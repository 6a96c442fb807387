"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def in_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows with columns of one width; the last of a row may be longer."""
    columns = range(max(map(len, rows)) - 1)
    widths = [max(len(row[column]) for row in rows if len(row) > column + 1) for column in columns]
    for row in rows:
        begin = "".join(f"  {cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=False))
        yield f"{begin}  {row[-1]}".rstrip()
