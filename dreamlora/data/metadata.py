"""``metadata.jsonl`` and ``metadata.csv``: a row per image with its name and its captions."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dreamlora.data.caption_text import (
    MOST_COLUMNS,
    captions_of,
    listed,
    not_utf8,
    pick_caption_column,
    plain,
    refuse_same,
    unique,
)
from dreamlora.data.entries import Entries, EntryKind, folded, kind_of, spelled
from dreamlora.errors import UserError
from dreamlora.reading import LINE_BYTES, is_regular, json_of, opened, shortened

NAME_COLUMN = "file_name"
METADATA_BYTES = 2**29
"""Of a metadata file: a million images have a fifth of it."""
_LOOKED_AHEAD = 100
"""Lines of a cell in which another row is looked for."""

Row = tuple[int, dict[str, Any]]


class Metadata(NamedTuple):
    """The metadata file of a folder.

    Attributes:
        file: None: there is none.
        rows: how many it has.
        other_texts: columns with texts that do not count, where it has no column of captions.
    """

    file: Path | None = None
    rows: int = 0
    other_texts: tuple[str, ...] = ()


def read_metadata(entries: Entries, caption_column: str | None) -> Metadata:
    """Put the captions of the folder's metadata file, if there is one, beside the names of its images.

    Raises:
        UserError: it cannot be read, has rows that fit neither its header nor the folder, or there are two.
    """
    names = list(entries.names(EntryKind.METADATA))
    if len(names) > 1:
        raise UserError(f"{entries.folder} has {' and '.join(names)}: keep one")
    if not names:
        return Metadata()
    file = entries.folder / names[0]
    columns, texts = _columns(file)
    column = pick_caption_column(columns, caption_column, str(file)) if columns else None
    count = 0
    for line, row in _rows(file, entries):
        count += 1
        where = f"{file}, line {line}"
        name = _resolve(entries, _file_name(row, where), where)
        _claim(entries, name, line, where)
        given = captions_of(_cell(row, column), where) if column else ()
        if file.suffix.lower() == ".csv":
            _refuse_list(given, where)
        entries.db.execute(
            "UPDATE entries SET captions = ?, line = ? WHERE name = ?", ("\n".join(given), line, os.fsencode(name))
        )
    if not count:
        raise UserError(f"{file} has no rows: write one for each image, or move the file elsewhere")
    entries.used(names[0], f"{count} row{'s' * (count > 1)}")
    return Metadata(file, count, () if column else tuple(texts))


def _columns(file: Path) -> tuple[list[str], list[str]]:
    """The columns of all rows, and those among them that have texts, besides the names of files."""
    columns: dict[str, None] = {}
    texts: dict[str, None] = {}
    for _, row in _rows(file):
        columns.update(dict.fromkeys(row))
        if len(columns) > MOST_COLUMNS:
            raise UserError(f"{file} has more than {MOST_COLUMNS:,} columns in all its rows: keep those that count")
        texts.update(dict.fromkeys(name for name, cell in row.items() if _is_text(cell) and plain(name) != NAME_COLUMN))
    return list(columns), [name for name in texts if not plain(name).endswith("file_name")]


def _is_text(cell: Any) -> bool:
    if isinstance(cell, list):
        return any(map(_is_text, cell))
    try:
        float(cell)
    except ValueError:
        return bool(cell.strip())
    except TypeError:
        pass
    return False


def _cell(row: dict[str, Any], column: str) -> Any:
    """The row's cell in a column, which rows of JSON may spell in other ways."""
    if column in row:
        return row[column]
    return next((cell for name, cell in row.items() if plain(name) == plain(column)), None)


def _file_name(row: dict[str, Any], where: str) -> str:
    name = _cell(row, NAME_COLUMN)
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: no file_name (columns: {listed(row)})")
    return name


def _refuse_list(given: tuple[str, ...], where: str) -> None:
    """A list written as text would be learned with its brackets."""
    try:
        listed_texts = given and given[0].startswith('["') and isinstance(json_of(given[0]), list)
    except ValueError:
        return
    if listed_texts:
        raise UserError(f"{where}: several captions of an image belong into a list in metadata.jsonl, not into a cell")


# Which image a row is about


def _resolve(entries: Entries, written: str, where: str) -> str:
    """The image's name in its folder, however a row spells it."""
    name = _inside(entries.folder, written, where)
    if kind_of(name) is not EntryKind.IMAGE:
        raise UserError(
            f"{where}: {shortened(written)[1:-1]} has no ending of an image: correct the row or take it out"
        )
    if "/" in name:
        try:
            entries.read_below(Path(name).parent.as_posix())
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if entries.kind(name):
        return name
    similar = [other for kind in (EntryKind.IMAGE, EntryKind.BELOW) for other in entries.like(name, kind)]
    same = [other for other in similar if spelled(other) == spelled(name)]
    same = same or [other for other in similar if folded(other) == folded(name)]
    if len(same) == 1:
        return same[0]
    hint = f" (there are {' and '.join(same)})" if same else _nearly(entries, written)
    missing = shortened(str(entries.folder / name))[1:-1]
    raise UserError(f"{where}: there is no file {missing}{hint}: correct the row or take it out")


def _inside(folder: Path, written: str, where: str) -> str:
    """The path in the folder that ``written`` means; ``..`` is not followed, whereever it leads."""
    path = Path(written)
    if path.is_absolute():
        bases = (base for base in (folder.absolute(), folder.resolve()) if path.is_relative_to(base))
        path = next((path.relative_to(base) for base in bases), path)
    if path.anchor or ".." in path.parts:
        raise UserError(
            f"{where}: {shortened(written)[1:-1]} lies outside of the folder {folder}, or goes through ..: put the "
            "image, or a link to it, there"
        )
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError(path)
    except ValueError:  # halves of characters among them
        raise UserError(f"{where}: {shortened(written)} can be no name of a file") from None
    return path.as_posix()


def _nearly(entries: Entries, written: str) -> str:
    """What the row could mean, for an error message."""
    for guess in (written.strip(), written.replace("\\", "/")):
        inside = not Path(guess).anchor and ".." not in Path(guess).parts
        if guess != written and inside and is_regular(entries.folder / guess):
            return f" (there is {guess})"
    return ""


def _claim(entries: Entries, name: str, line: int, where: str) -> None:
    """Each image has one row."""
    if entries.kind(name) is not EntryKind.IMAGE:
        entries.take_as_image(name)
    query = "SELECT line FROM entries WHERE name = ?"
    before = entries.db.execute(query, (os.fsencode(name),)).fetchone()[0]
    if before:
        raise UserError(f"{where}: {name} was named before, in line {before}: keep one row per image")


# Rows of either kind of file


def _rows(file: Path, entries: Entries | None = None) -> Iterator[Row]:
    """Line number and columns of every row; the file is read bit by bit.

    Args:
        file: of metadata.
        entries: to notice a row that has swallowed others.
    """
    jsonl = file.suffix.lower() == ".jsonl"
    try:
        with opened(file) as content:
            if os.fstat(content.fileno()).st_size > METADATA_BYTES:
                raise UserError(f"{file} is larger than metadata can be ({METADATA_BYTES // 2**20} MiB)")
            lines = _lines(file, content, None if jsonl else "")
            yield from _jsonl_rows(file, lines) if jsonl else _csv_rows(file, lines, entries)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _lines(file: Path, content: Any, newline: str | None) -> Iterator[str]:
    head = content.peek(2)[:2]
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)
    try:
        for number in itertools.count(1):
            line = text.readline(LINE_BYTES + 1)
            if not line:
                return
            if "\0" in line:
                raise not_utf8(file, head + b"\0")
            if len(line) > LINE_BYTES:
                raise UserError(f"{file}, line {number} is longer than a row can be ({LINE_BYTES // 2**10} KiB)")
            yield line
    except UnicodeDecodeError:
        raise not_utf8(file, head) from None


def _jsonl_rows(file: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                row = json_of(line, functools.partial(unique, where=where))
            except ValueError as error:
                raise UserError(f"{where}: not JSON that can be read ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f'{where}: expected {{"file_name": ..., "text": ...}}')
            yield number, row


def _csv_rows(file: Path, lines: Iterable[str], entries: Entries | None) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where = f"{file}, line {line}"
            if header is None:
                header = cells
                _check_header(header, file)
            elif any(cell.strip() for cell in cells):
                _check_cells(header, cells, where)
                if entries is not None and reader.line_num > line:
                    _check_swallowed(entries, cells, where)
                yield line, {name: cell for name, cell in zip(header, cells, strict=True) if name.strip()}
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}, line {line}: {error}. A cell that begins with a quotation mark must end with one; one inside is "
            'written twice ("")'
        ) from None


def _check_header(header: list[str], file: Path) -> None:
    for delimiter, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and delimiter in header[0]:
            raise UserError(f"{file} has {called} between its columns: save it with commas")
    refuse_same(header, str(file))
    if NAME_COLUMN not in map(plain, header):
        raise UserError(
            f"{file} has no column file_name in its first line: it has {listed(header)}. Call the column with the "
            "names of the images file_name"
        )


def _check_cells(header: list[str], cells: list[str], where: str) -> None:
    """Every cell has a column with a name; only the first may have none (pandas writes row numbers there)."""
    nameless = [cell for name, cell in zip(header[1:], cells[1:], strict=False) if cell.strip() and not name.strip()]
    if len(cells) > len(header) or nameless:
        raise UserError(
            f"{where}: {len(cells)} cells, but the first line names {sum(bool(name.strip()) for name in header)} "
            f"columns. A text with commas belongs in quotation marks: {_quoted(header, cells)}"
        )
    if len(cells) < len(header):
        raise UserError(
            f"{where}: {len(cells)} cells, but the first line names {len(header)} columns ({listed(header)}): write "
            "every cell, an empty one too"
        )


def _quoted(header: list[str], cells: list[str]) -> str:
    """The row as it was probably meant: what is too much belongs to the last column."""
    last = max(place for place, name in enumerate(header) if name.strip())
    text = ", ".join(cell.strip() for cell in cells[last:] if cell.strip())
    return ",".join([*cells[:last], '"' + text.replace('"', '""') + '"'])


def _check_swallowed(entries: Entries, cells: list[str], where: str) -> None:
    """A forgotten quotation mark makes the next lines part of a cell."""
    for cell in cells:
        for text in cell.splitlines()[1:_LOOKED_AHEAD]:
            name = text.split(",")[0].strip().strip('"')
            if name and kind_of(name) is EntryKind.IMAGE and entries.kind(name):
                raise UserError(
                    f"{where}: the row goes on over the line of {name}: a quotation mark is missing, or one too many"
                )
