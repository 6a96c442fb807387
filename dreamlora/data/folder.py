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
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dreamlora.data.images import FORMATS, ImageRecord, readable
from dreamlora.errors import UserError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_COLUMNS = ("text", "caption")


class Images(NamedTuple):
    """What was found.

    Attributes:
        records: the images.
        skipped: names of files that are neither images nor captions.
    """

    records: list[ImageRecord]
    skipped: tuple[str, ...] = ()


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
    files = {file.name: file for file in _visible_files(folder, flag)}
    metadata = _metadata_captions(folder, files, caption_column)
    images = {name: folder / name for name in {*files, *metadata} if Path(name).suffix.lower() in FORMATS}
    if not images:
        raise UserError(_no_images(folder, flag))
    _refuse_unreadable(images)
    captions = {name: _sidecar(file) or metadata.get(name) or tidy(prompt) for name, file in images.items()}
    _refuse_uncaptioned(folder, captions)
    records = [
        ImageRecord(name, captions[name], images[name].read_bytes, str(images[name]))
        for name in sorted(images, key=natural_key)
    ]
    expected = {*images, *METADATA_FILES}
    others = [n for n in files if n not in expected and Path(n).suffix.lower() not in CAPTION_SUFFIXES]
    return Images(records, tuple(sorted(others, key=natural_key)))


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts numbers inside names by value, ignoring case; equal ones by their spelling."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name


def tidy(value: Any) -> str:
    """A caption on one line; the first of several; "" for none."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return " ".join(str(value).split()) if value is not None else ""


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


def _visible_files(folder: Path, flag: str) -> list[Path]:
    if folder.is_file():
        raise UserError(f"{flag} {folder} is a file: give the folder it lies in")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder (looked from {Path.cwd()})")
    try:
        return [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be read: {error.strerror}") from error


def _no_images(folder: Path, flag: str) -> str:
    below = next((file for file in sorted(folder.rglob("*")) if file.suffix.lower() in FORMATS), None)
    if below:
        return f"{flag} {folder} holds images only in sub-folders, which are not searched: give {below.parent}"
    return f"{flag} {folder} holds no images (looked for {', '.join(FORMATS)})"


def _refuse_unreadable(images: Mapping[str, Path]) -> None:
    """Photos left out silently would be worse than a stop."""
    foreign = sorted(name for name, file in images.items() if not readable(file))
    if foreign:
        raise UserError(
            f"the installed Pillow cannot read {foreign[0]} ({len(foreign)} such files): convert them to JPEG or PNG, "
            "or move them elsewhere"
        )


def _refuse_uncaptioned(folder: Path, captions: Mapping[str, str]) -> None:
    bare = sorted((name for name, caption in captions.items() if not caption), key=natural_key)
    if bare:
        raise UserError(
            f"{folder / bare[0]} has no caption, or an empty one ({len(bare)} of {len(captions)} images): write it to "
            f"{Path(bare[0]).with_suffix('.txt')} beside it, or give --instance_prompt for all that have none"
        )


def _sidecar(image: Path) -> str:
    """The caption beside an image, or ""."""
    for suffix in (*CAPTION_SUFFIXES, *(suffix.upper() for suffix in CAPTION_SUFFIXES)):
        file = image.with_suffix(suffix)
        if file.is_file() and (caption := tidy(_text(file))):
            return caption
    return ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it with that encoding") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _metadata_captions(folder: Path, files: Mapping[str, Path], caption_column: str | None) -> dict[str, str]:
    """Captions by file name from the metadata file, if there is one; "" where a row has none."""
    found = [files[name] for name in METADATA_FILES if name in files]
    if len(found) > 1:
        raise UserError(f"{folder} has both metadata.jsonl and metadata.csv: keep one")
    if not found:
        return {}
    file = found[0]
    rows = list(_jsonl_rows(file) if file.suffix == ".jsonl" else _csv_rows(file))
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    column = pick_caption_column(columns, caption_column, str(file)) if rows else None
    captions: dict[str, str] = {}
    for line, row in rows:
        if not row.get("file_name"):
            raise UserError(f"{file}, line {line}: no file_name (columns: {', '.join(map(str, row))})")
        name = Path(str(row["file_name"])).as_posix()
        if name in captions:
            raise UserError(f"{file}, line {line}: {name} was named before: keep one row per image")
        if not (folder / name).is_file():
            raise UserError(f"{file}, line {line}: there is no file {folder / name}: correct the row or take it out")
        captions[name] = tidy(row.get(column)) if column else ""
    return captions


def _jsonl_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise UserError(f'{file}, line {number}: expected {{"file_name": ..., "text": ...}}')
            yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(_text(file).splitlines(keepends=True))
    for row in reader:
        yield reader.line_num, {column: value for column, value in row.items() if column is not None}
