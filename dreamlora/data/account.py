"""What became of every entry of a data set: its image with which captions from where, or why it is not used."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dreamlora.data.catalog import Catalog, to_bytes, to_text
from dreamlora.data.entries import KOHYA_FOLDER, Entries, EntryKind, images_below, shown

HIDDEN = "entries whose names begin with a dot are left alone"
NO_ROLE = "no image, caption or metadata"
NO_SUCH_IMAGE = "there is no image of this name"
MOST_REASONS = 12
"""Kinds of unused entries that one warning has room for."""
TRUNCATED = "an image beyond --max_train_samples"


class Entry(NamedTuple):
    """One entry of a data set.

    Attributes:
        name: in its folder, or the row.
        use: "image", "caption", "metadata", "folder" or "not used".
        source: where an image's captions come from: a file, a line of the metadata, or a flag.
        texts: an image's captions; else what the entry is used for, or why it is not.
    """

    name: str
    use: str
    source: str
    texts: tuple[str, ...]


class FolderAccount:
    """Of a folder, whose entries lie in the catalogue's database."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def __iter__(self) -> Iterator[Entry]:
        query = f"SELECT name, kind, use, reason FROM entries WHERE {_LISTED} ORDER BY sort"
        row = 0
        hidden = 0
        for name, kind, use, reason in self._catalog.db.execute(query):
            spelled = os.fsdecode(name)
            if kind == EntryKind.IMAGE:
                yield _image(self._catalog, row, spelled)
                row += 1
            elif use:
                yield Entry(spelled, kind, "", (to_text(use),))
            elif kind == EntryKind.HIDDEN:
                hidden += 1
            else:
                yield Entry(spelled, "not used", "", (to_text(reason or b""),))
        if hidden:
            yield Entry(f"{hidden} hidden", "not used", "", (HIDDEN,))


class RowAccount:
    """Of rows that are all used, as far as they were not cut off."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def __iter__(self) -> Iterator[Entry]:
        return (_image(self._catalog, row, row_name(row)) for row in range(len(self._catalog)))


def row_name(row: int) -> str:
    """What a row without a name of its own is called."""
    return f"row-{row:06d}"


def _image(catalog: Catalog, row: int, name: str) -> Entry:
    if row >= len(catalog):
        return Entry(name, "not used", "", (TRUNCATED,))
    return Entry(name, "image", catalog.source(row), catalog[row].captions)


_LISTED = "(listed OR use IS NOT NULL OR kind = 'image')"


def explain_unused(entries: Entries) -> None:
    """Write down why each entry without a use has none."""
    for name in list(entries.names(EntryKind.FOLDER)):
        _explain_folder(entries, name)
    db = entries.db
    for kind, reason in (
        (EntryKind.SYSTEM, "a file of the operating system"),
        (EntryKind.OTHER, NO_ROLE),
        (EntryKind.CAPTION, NO_SUCH_IMAGE),
    ):
        query = "UPDATE entries SET reason = ? WHERE kind = ? AND use IS NULL AND reason IS NULL AND listed"
        db.execute(query, (to_bytes(reason), kind))


def _explain_folder(entries: Entries, name: str) -> None:
    folder = entries.folder
    if folder.resolve().is_relative_to((folder / name).resolve()):
        return entries.unused(name, "a link to the folder itself, or to one above it")

    def known(path: str) -> bool:
        return entries.kind(Path(path).relative_to(folder).as_posix()) is EntryKind.IMAGE

    count = sum(images_below(folder / name, known).values())
    if count:
        convention = KOHYA_FOLDER.fullmatch(name)
        meant = f"; {kohya_meaning(convention[1], convention[2])}" if convention else ""
        reason = f"a folder, whose images ({count}) are not used: give it as a data set of its own{meant}"
        return entries.unused(name, reason)
    if entries.uses_below(name):
        return entries.used(name, "its images are named in the metadata")
    return entries.unused(name, "a folder without images")


def kohya_meaning(repeats: str, prompt: str) -> str:
    """What a folder's name means to kohya's trainers, and how it is said here."""
    return (
        f'kohya\'s trainers read its name as {int(repeats)} repeats and the prompt "{prompt}", here a name means '
        f'nothing: give --repeats {int(repeats)} --instance_prompt "{prompt}" with it'
    )


def unused_note(entries: Entries) -> list[str]:
    """One warning that names what is not used; hidden and system files are not worth one."""
    query = (
        "SELECT reason, COUNT(*) FROM entries WHERE use IS NULL AND reason IS NOT NULL AND listed AND kind != ? "
        "GROUP BY reason ORDER BY MIN(sort) LIMIT ?"
    )
    told, total = [], 0
    for reason, count in entries.db.execute(query, (EntryKind.SYSTEM, MOST_REASONS)).fetchall():
        names = _names(entries.db, reason)
        told.append(f"{shown(names, count)} ({to_text(reason)})")
        total += count
    if not told:
        return []
    what = "1 entry that is" if total == 1 else f"{total} entries that are"
    return [f"{entries.folder} has {what} not used: {'; '.join(told)}"]


def links_note(entries: Entries) -> list[str]:
    """What is to be said of links: whoever made the folder chose files of this machine with them."""
    names = list(entries.followed_links())
    told = (f"{name} (to {os.readlink(entries.folder / name)})" for name in names)  # noqa: PTH115 - as it is spelled
    what = f"1 file of {entries.folder} lies elsewhere, behind a link"
    if len(names) > 1:
        what = f"{len(names)} files of {entries.folder} lie elsewhere, behind links"
    return [f"{what}: {shown(told, len(names))}"] if names else []


def _names(db: sqlite3.Connection, reason: bytes) -> Iterator[str]:
    query = "SELECT name FROM entries WHERE use IS NULL AND reason = ? AND listed ORDER BY sort"
    return (os.fsdecode(name) for (name,) in db.execute(query, (reason,)))


def folder_name_note(folder: Path) -> list[str]:
    """What is to be said of a folder whose own name follows kohya's convention."""
    convention = KOHYA_FOLDER.fullmatch(folder.absolute().name)
    return [f"{folder}: {kohya_meaning(convention[1], convention[2])}"] if convention else []
