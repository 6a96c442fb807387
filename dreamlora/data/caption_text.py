"""What is read as a caption: text on one line, or a list of such texts of which one is drawn each time."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dreamlora.config.ranges import check_length
from dreamlora.errors import UserError
from dreamlora.reading import read_bytes, shortened

CAPTION_COLUMNS = ("text", "caption")
TEXT_BYTES = 2**20
"""Of a caption file: those with all tags and scores of a picture have some ten kilobytes."""
MOST_CAPTIONS = 1000
"""Of one image."""
MOST_COLUMNS = 1000
"""Of metadata, or keys of a .json caption."""
_LISTED = 30
"""Columns that a message names."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def tidy(text: str | None) -> str:
    """``text`` on one line; "" for None."""
    line = " ".join((text or "").split())
    return line.encode("utf-8", "replace").decode()  # JSON can spell halves of characters, which no tokenizer takes


def captions_of(value: Any, where: str) -> tuple[str, ...]:
    """The captions that a cell, a key or a file's content gives: none, one, or several.

    Args:
        value: None, a text, or a list of texts; empty ones do not count.
        where: it stands, for the error message.

    Raises:
        UserError: it is something else, or too long.
    """
    texts = list(value) if isinstance(value, list | tuple) else [value]
    if len(texts) > MOST_CAPTIONS:
        raise UserError(f"{where}: {len(texts):,} captions are too many for an image: {MOST_CAPTIONS:,} are the most")
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: a caption is a text or a list of texts (got {shortened(text)})")
        check_length(text or "", where)
    return tuple(caption for caption in map(tidy, texts) if caption)


def pick_caption_column(columns: Sequence[str], wanted: str | None, place: str) -> str | None:
    """``wanted``, or whichever of ``text`` and ``caption`` there is; blanks around a name and its case do not count.

    Raises:
        UserError: there is no column ``wanted``, or both of the usual ones; the message lists the columns.
    """
    names = (wanted,) if wanted is not None else CAPTION_COLUMNS
    matching = [column for column in columns if column in names]
    matching = matching or [column for column in columns if plain(column) in map(plain, names)]
    if len(matching) > 1:
        raise UserError(
            f"{place} has the columns {' and '.join(map(repr, matching[:4]))}: say which one has the captions with "
            "--caption_column"
        )
    if wanted is not None and not matching:
        raise UserError(f"{place} has no column {wanted!r} (--caption_column): it has {listed(columns)}")
    return matching[0] if matching else None


def plain(column: str) -> str:
    """A column's name as it compares to others."""
    return column.strip().casefold()


def listed(columns: Iterable[str]) -> str:
    """Columns for a message; in quotes where blanks would not be seen."""
    names = list(columns)
    told = [shortened(name) if not name or name != name.strip() else shortened(name)[1:-1] for name in names[:_LISTED]]
    return ", ".join(told) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def refuse_same(columns: Sequence[str], where: str) -> None:
    """Nothing, if every column has a name of its own.

    Raises:
        UserError: two are the same but for blanks around them and case, or there are too many.
    """
    if len(columns) > MOST_COLUMNS:
        raise UserError(f"{where} has {len(columns):,} columns: {MOST_COLUMNS:,} are the most")
    count = Counter(map(plain, columns))
    twice = [column for column in columns if column and count[plain(column)] > 1]
    if twice:
        name = shortened(twice[0].strip())[1:-1]
        raise UserError(f"{where} has the column {name} twice ({listed(twice)}): keep one, or rename one")


def unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """An object of JSON; raises as ``refuse_same``."""
    refuse_same([name for name, _ in pairs], where)
    return dict(pairs)


def text_of(file: Path) -> str:
    """The content of a text file.

    Raises:
        UserError: it cannot be read, is larger than a caption file can be, or is not UTF-8.
    """
    try:
        content = read_bytes(file, TEXT_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(file, content) from None
    if "\0" in text:
        raise not_utf8(file, content)
    return text


def not_utf8(file: Path, content: bytes) -> UserError:
    """The error of a text file in another encoding; ``content`` is its beginning, or all of it."""
    seems = "UTF-16" if content.startswith(_UTF16) else "UTF-16, or no text" if b"\0" in content else ""
    return UserError(f"{file} is not UTF-8 text{seems and f' (it seems to be {seems})'}: save it with that encoding")
