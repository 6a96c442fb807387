"""A folder of images with captions beside them.

Images are taken in natural order of their names (img2 before img10). Sub-folders are not descended; only images that a
metadata file names may lie in one. The caption of an image is the first of these that is not empty:

1. ``name.txt``, then ``name.caption``, beside ``name.jpg``; line breaks become spaces,
2. its row in ``metadata.jsonl`` or ``metadata.csv``: columns ``file_name`` and ``text`` or ``caption`` (the
   convention of Hugging Face's image folders),
3. the prompt for all.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dreamlora.data.catalog import Catalog
from dreamlora.data.file_index import stamp_of
from dreamlora.data.images import FORMATS, readable
from dreamlora.errors import UserError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_COLUMNS = ("text", "caption")
MOST_NAMED = 100
"""Skipped files that are told by name; a folder can hold any number."""


class Images(NamedTuple):
    """The images of a data set.

    Attributes:
        records: the images.
        skipped: names of files that are neither images nor captions, the first 100 of them.
    """

    records: Catalog
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class FolderPlace:
    """Image files by their names in a folder; a ``catalog.Place``."""

    folder: Path

    def reader(self, row: int, name: str) -> Any:
        """Reads the file."""
        return (self.folder / name).read_bytes

    def where(self, row: int, name: str) -> str:
        """The file's path."""
        return str(self.folder / name)

    def stamp(self, row: int, name: str) -> tuple[str, str] | None:
        """Absolute path, and the file's size and times."""
        file = self.folder / name
        stamp = stamp_of(file)
        return (str(file.absolute()), stamp) if stamp else None


def load_folder(
    folder: Path, prompt: str | None = None, caption_column: str | None = None, flag: str = "--instance_data_dir"
) -> Images:
    """The images of ``folder`` with their captions; no image is opened yet.

    Args:
        folder: where the images lie.
        prompt: caption of images without one.
        caption_column: column of the metadata file, instead of ``text`` or ``caption``.
        flag: option that names the folder, for error messages.

    Raises:
        UserError: no folder or no image there, an image without caption, metadata that do not fit the folder, an image
            format that cannot be read.
    """
    catalog = Catalog(FolderPlace(folder))
    with catalog.filling() as db:
        _list_files(db, folder, flag)
        _read_metadata(db, folder, caption_column)
        if not db.execute("SELECT 1 FROM files WHERE image LIMIT 1").fetchone():
            raise UserError(_no_images(folder, flag))
        _refuse_unreadable(db)
        _add_captioned(catalog, folder, tidy(prompt), flag)
        skipped = db.execute(
            "SELECT name FROM files WHERE NOT image AND NOT sidecar ORDER BY sort LIMIT ?", (MOST_NAMED,)
        )
        return Images(
            catalog, tuple(os.fsdecode(name) for (name,) in skipped if os.fsdecode(name) not in METADATA_FILES)
        )


def natural_key(name: str) -> bytes:
    """Sorts numbers inside names by value, ignoring case; equal ones by their spelling.

    Names are split into texts and numbers in turn. A text ends in the lowest character; a number is its digits without
    leading zeros after their count, so that as text, too, the longer one is the larger.
    """
    parts = re.split(r"(\d+)", name.casefold())
    texts = [f"{len(str(int(part))):03d}{int(part)}" if part.isdecimal() else f"{part}\0" for part in parts]
    return "".join([*texts, "\0", name]).encode("utf-8", "surrogateescape")


def tidy(value: Any) -> str:
    """A caption on one line; the first of several; "" for none."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    text = " ".join(str(value).split()) if value is not None else ""
    return text.encode("utf-8", "replace").decode()  # JSON can spell halves of characters, which no tokenizer takes


def pick_caption_column(columns: list[str], wanted: str | None, place: str) -> str | None:
    """``wanted``, or whichever of ``text`` and ``caption`` there is.

    Raises:
        UserError: there is no column ``wanted``; the message lists the columns.
    """
    if wanted is None:
        return next((column for column in CAPTION_COLUMNS if column in columns), None)
    if wanted not in columns:
        raise UserError(f"{place} has no column {wanted!r} (--caption_column): it has {', '.join(columns)}")
    return wanted


def _list_files(db: Any, folder: Path, flag: str) -> None:
    if folder.is_file():
        raise UserError(f"{flag} {folder} is a file: give the folder it lies in")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder (looked from {Path.cwd()})")
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_file():
                    _add_file(db, entry.name)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be read: {error.strerror}") from error


def _add_file(db: Any, name: str) -> None:
    suffix = Path(name).suffix.lower()
    row = (os.fsencode(name), suffix in FORMATS, suffix in CAPTION_SUFFIXES, natural_key(name))
    db.execute("INSERT INTO files (name, image, sidecar, sort) VALUES (?, ?, ?, ?)", row)


def _no_images(folder: Path, flag: str) -> str:
    below = next((file for file in sorted(folder.rglob("*")) if file.suffix.lower() in FORMATS), None)
    if below:
        return f"{flag} {folder} holds images only in sub-folders, which are not searched: give {below.parent}"
    return f"{flag} {folder} holds no images (looked for {', '.join(FORMATS)})"


def _refuse_unreadable(db: Any) -> None:
    """Photos left out silently would be worse than a stop."""
    first, count = None, 0
    for (name,) in db.execute("SELECT name FROM files WHERE image ORDER BY sort"):
        if not readable(Path(os.fsdecode(name))):
            first, count = first or os.fsdecode(name), count + 1
    if first:
        raise UserError(
            f"the installed Pillow cannot read {first} ({count} such files): convert them to JPEG or PNG, "
            "or move them elsewhere"
        )


def _add_captioned(catalog: Catalog, folder: Path, prompt: str, flag: str) -> None:
    """Every image, in natural order, as a row of the catalogue; refuses images without a caption."""
    bare, count = None, 0
    for encoded, metadata in catalog.db.execute("SELECT name, caption FROM files WHERE image ORDER BY sort"):
        name = os.fsdecode(encoded)
        caption = _sidecar(catalog.db, folder, name) or metadata or prompt
        if not caption:
            bare, count = bare or name, count + 1
        catalog.add(name, caption)
    if bare:
        otherwise = "" if flag == "--train_data_dir" else ", or give --instance_prompt for all that have none"
        raise UserError(
            f"{folder / bare} has no caption, or an empty one ({count} of {len(catalog)} images): write it to "
            f"{Path(bare).with_suffix('.txt')} beside it{otherwise}"
        )


def _sidecar(db: Any, folder: Path, name: str) -> str:
    """The caption beside an image, or ""."""
    for suffix in (*CAPTION_SUFFIXES, *(suffix.upper() for suffix in CAPTION_SUFFIXES)):
        beside = str(Path(name).with_suffix(suffix))
        if _exists(db, folder, beside) and (caption := tidy(_text(folder / beside))):
            return caption
    return ""


def _exists(db: Any, folder: Path, name: str) -> bool:
    """Whether there is such a file; those of sub-folders are not listed."""
    if Path(name).parent != Path():
        return (folder / name).is_file()
    return db.execute("SELECT 1 FROM files WHERE name = ?", (os.fsencode(name),)).fetchone() is not None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it with that encoding") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _read_metadata(db: Any, folder: Path, caption_column: str | None) -> None:
    """Put the captions of the metadata file, if there is one, beside the names of the files."""
    metadata_files = [folder / name for name in METADATA_FILES if _exists(db, folder, name)]
    if len(metadata_files) > 1:
        raise UserError(f"{folder} has both metadata.jsonl and metadata.csv: keep one")
    if not metadata_files:
        return
    file = metadata_files[0]
    column = _caption_column(file, caption_column)
    for line, row in _rows(file):
        if not row.get("file_name"):
            raise UserError(f"{file}, line {line}: no file_name (columns: {', '.join(map(str, row))})")
        name = Path(str(row["file_name"])).as_posix()
        known = db.execute("SELECT line FROM files WHERE name = ?", (os.fsencode(name),)).fetchone()
        if known and known[0]:
            raise UserError(f"{file}, line {line}: {name} was named before: keep one row per image")
        if not known and not (folder / name).is_file():
            raise UserError(f"{file}, line {line}: there is no file {folder / name}: correct the row or take it out")
        if not known:
            _add_file(db, name)
        caption = tidy(row.get(column)) if column else ""
        db.execute("UPDATE files SET caption = ?, line = ? WHERE name = ?", (caption, line, os.fsencode(name)))


def _caption_column(file: Path, wanted: str | None) -> str | None:
    """The column of the captions, from the columns of all rows."""
    columns: dict[str, None] = {}
    for _, row in _rows(file):
        columns.update(dict.fromkeys(row))
    return pick_caption_column(list(columns), wanted, str(file)) if columns else None


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns of every row; the file is read bit by bit."""
    try:
        with file.open(encoding="utf-8-sig", newline="" if file.suffix == ".csv" else None) as lines:
            yield from _jsonl_rows(file, lines) if file.suffix == ".jsonl" else _csv_rows(lines)
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it with that encoding") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _jsonl_rows(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise UserError(f'{file}, line {number}: expected {{"file_name": ..., "text": ...}}')
            yield number, row


def _csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines)
    for row in reader:
        yield reader.line_num, {column: value for column, value in row.items() if column is not None}
