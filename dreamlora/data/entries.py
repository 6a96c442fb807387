"""The entries of a data folder, as rows of a table beside the catalogue: none is passed over, however many there are.

An entry is first taken for what its name and kind of file say (``EntryKind``). Whoever reads captions then writes down
what became of it: its use, or the reason why it has none.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path

from dreamlora.data.catalog import to_bytes, to_text
from dreamlora.data.images import FORMATS
from dreamlora.errors import UserError
from dreamlora.reading import lies_inside

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Of caption files, in their order of precedence."""
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx", ".ods")
"""Of files that could hold captions, and are not read."""
SYSTEM_NAMES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found"),
}
"""What operating systems put into folders, in lower case; hidden ones (.DS_Store) need no name here."""
NOTES = re.compile(r"(readme|licen[cs]e|copying|notes?|credits|attribution|changelog|about|sources?|urls?|todo)\b.*")
"""Names of text files that are meant for people."""
KOHYA_FOLDER = re.compile(r"(\d{1,3})_(.+)")
"""kohya's convention, ``<repeats>_<prompt>``: "10_sks dog"."""
MOST_WALKED = 20_000
"""Entries of sub-folders that are looked at to count images there; a wrong folder can hold a whole disk."""

SCHEMA = """
CREATE TABLE entries (name BLOB PRIMARY KEY, kind TEXT, stem BLOB, sort BLOB, identity TEXT, listed INTEGER,
                      link INTEGER, captions TEXT, line INTEGER, use BLOB, reason BLOB);
CREATE INDEX stems ON entries (stem);
CREATE INDEX identities ON entries (identity);
"""


class EntryKind(StrEnum):
    """What an entry seems to be."""

    IMAGE = "image"
    CAPTION = "caption"
    METADATA = "metadata"
    HIDDEN = "hidden"
    SYSTEM = "system"
    FOLDER = "folder"
    OTHER = "other"
    BELOW = "below"
    """An image of a sub-folder, which only the metadata can make one of the data set's."""


class Entries:
    """The entries of one folder; images that its metadata name in sub-folders are added to them.

    Args:
        db: of the catalogue that is being filled.
        folder: where they lie.
    """

    def __init__(self, db: sqlite3.Connection, folder: Path) -> None:
        self.db = db
        self.folder = folder
        self._below: set[str] = set()
        db.executescript(SCHEMA)

    def read(self, flag: str) -> None:
        """List the folder.

        Raises:
            UserError: it is no folder, cannot be read, or holds something with a name of an image, caption or metadata
                file that is no file.
        """
        check_folder(self.folder, flag)
        try:
            with os.scandir(self.folder) as found:
                for entry in found:
                    self._list(entry)
        except OSError as error:
            raise UserError(f"{flag} {self.folder} cannot be read: {error.strerror}") from error

    def add(
        self,
        name: str,
        status: os.stat_result | None,
        kind: EntryKind | None = None,
        *,
        listed: bool = True,
        link: bool = False,
    ) -> None:
        """Put an entry down.

        Args:
            name: path inside the folder.
            status: of the file that it is, or points to.
            kind: None: what its name says.
            listed: whether it is an entry of the folder itself.
            link: whether it points to another file.
        """
        kind = kind or kind_of(Path(name).name)
        identity = f"{status.st_dev}/{status.st_ino}" if status is not None and status.st_ino else None
        row = (os.fsencode(name), kind, _stem(name, kind), natural_key(name), identity, listed, link)
        columns = "name, kind, stem, sort, identity, listed, link"
        self.db.execute(f"INSERT INTO entries ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def unused_as(self, kind: EntryKind, reason: str) -> Iterator[str]:
        """Names of one kind that are not used for this reason, in natural order."""
        return self.names(kind, "use IS NULL AND reason = ?", (to_bytes(reason),))

    def names(self, kind: EntryKind, where: str = "1", parameters: tuple[object, ...] = ()) -> Iterator[str]:
        """Names of one kind, in natural order."""
        query = f"SELECT name FROM entries WHERE kind = ? AND {where} ORDER BY sort"
        return (os.fsdecode(name) for (name,) in self.db.execute(query, (kind, *parameters)))

    def like(self, name: str, kind: EntryKind) -> list[str]:
        """Names of one kind that differ from ``name`` in case, spelling in Unicode and endings alone."""
        return list(self.names(kind, "stem = ?", (_stem(name, self.kind(name) or kind_of(name)),)))

    def kind(self, name: str) -> EntryKind | None:
        """What the entry of exactly this name is; None if there is none."""
        row = self.db.execute("SELECT kind FROM entries WHERE name = ?", (os.fsencode(name),)).fetchone()
        return EntryKind(row[0]) if row else None

    def read_below(self, parent: str) -> None:
        """Put down the images of a sub-folder, and the caption files beside them, once.

        Raises:
            UserError: it lies elsewhere, behind a link.
        """
        if parent in self._below:
            return
        self._below.add(parent)
        place = self.folder / parent
        with contextlib.suppress(OSError), os.scandir(place) as found:  # none of them is there, then
            if not lies_inside(place, self.folder):
                raise UserError(
                    f"{place} leads out of {self.folder} through a link: put the files, or links to each of them, there"
                )
            for entry in found:
                kind = kind_of(entry.name)
                if kind in (EntryKind.IMAGE, EntryKind.CAPTION) and entry.is_file():
                    name = (Path(parent) / entry.name).as_posix()
                    kind = EntryKind.BELOW if kind is EntryKind.IMAGE else kind
                    self.add(name, entry.stat(), kind, listed=False, link=entry.is_symlink())

    def same_files(self, kind: EntryKind) -> Iterator[tuple[str, str]]:
        """Pairs of names of one kind, next to each other, that the file system says are one file."""
        query = (
            "SELECT name, next FROM (SELECT name, sort, LEAD(name) OVER (PARTITION BY identity ORDER BY sort) AS next "
            "FROM entries WHERE kind = ? AND identity IS NOT NULL) WHERE next IS NOT NULL ORDER BY sort"
        )
        return ((os.fsdecode(a), os.fsdecode(b)) for a, b in self.db.execute(query, (kind,)))

    def followed_links(self) -> Iterator[str]:
        """Names of the files in use that lie elsewhere: the entry points to them."""
        used = "(use IS NOT NULL OR kind = ?)"
        query = f"SELECT name FROM entries WHERE link AND {used} ORDER BY sort"
        return (os.fsdecode(name) for (name,) in self.db.execute(query, (EntryKind.IMAGE,)))

    def take_as_image(self, name: str) -> None:
        """Make an image of one that is hidden or lies in a sub-folder."""
        query = "UPDATE entries SET kind = ?, stem = ? WHERE name = ?"
        self.db.execute(query, (EntryKind.IMAGE, _stem(name, EntryKind.IMAGE), os.fsencode(name)))

    def uses_below(self, parent: str) -> bool:
        """Whether images of a sub-folder, or below it, belong to the data set."""
        query = "SELECT 1 FROM entries WHERE kind = ? AND name > ? AND name < ? LIMIT 1"
        bounds = (os.fsencode(f"{parent}/"), os.fsencode(f"{parent}0"))  # 0 comes after /
        return self.db.execute(query, (EntryKind.IMAGE, *bounds)).fetchone() is not None

    def used(self, name: str, use: str) -> None:
        """Write down what an entry is used for; several uses are joined."""
        before = self.use_of(name)
        joined = f"{before}, {use}" if before else use
        query = "UPDATE entries SET reason = NULL, use = ? WHERE name = ?"
        self.db.execute(query, (to_bytes(joined), os.fsencode(name)))

    def use_of(self, name: str) -> str:
        """What an entry is used for so far."""
        row = self.db.execute("SELECT use FROM entries WHERE name = ?", (os.fsencode(name),)).fetchone()
        return to_text(row[0] or b"")

    def unused(self, name: str, reason: str) -> None:
        """Write down why an entry is not used, unless it is."""
        query = "UPDATE entries SET reason = ? WHERE name = ? AND use IS NULL"
        self.db.execute(query, (to_bytes(reason), os.fsencode(name)))

    def _list(self, entry: os.DirEntry[str]) -> None:
        name = entry.name
        if name.startswith("."):
            return self.add(name, None, EntryKind.HIDDEN, link=entry.is_symlink())
        if name.lower() in SYSTEM_NAMES:
            return self.add(name, None, EntryKind.SYSTEM)
        try:
            status: os.stat_result | None = entry.stat()
        except OSError:
            status = None
        kind = kind_of(name)
        if status is not None and stat.S_ISREG(status.st_mode):
            return self.add(name, status, kind, link=entry.is_symlink())
        what = _what(status, entry)
        if (
            kind is EntryKind.IMAGE
            or kind is EntryKind.METADATA
            or (kind is EntryKind.CAPTION and not _is_folder(status))
        ):
            raise UserError(f"{self.folder / name} is {what}, not a file: take it out of the folder, or rename it")
        if _is_folder(status):
            return self.add(name, None, EntryKind.FOLDER)
        self.add(name, None, EntryKind.OTHER)
        self.unused(name, what)
        return None


def check_folder(folder: Path, flag: str) -> None:
    """Nothing, if ``folder`` is one.

    Raises:
        UserError: it is a file, or there is none.
    """
    try:
        if folder.is_dir():
            return
        there = folder.exists()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be read: {error.strerror}") from error
    if there:
        raise UserError(f"{flag} {folder} is a file: give the folder it lies in")
    raise UserError(f"{flag} {folder}: there is no such folder (looked from {Path.cwd()})")


def kind_of(name: str) -> EntryKind:
    """What a file's name says it is."""
    suffix = _split(name)[1].lower()
    if suffix in FORMATS:
        return EntryKind.IMAGE
    if name.lower() in METADATA_FILES:
        return EntryKind.METADATA
    return EntryKind.CAPTION if suffix in CAPTION_SUFFIXES else EntryKind.OTHER


def may_hold_captions(name: str) -> bool:
    """Whether a file that is not used could have been meant to give captions."""
    path = Path(name.lower())
    return path.suffix in (*CAPTION_SUFFIXES, *TABLE_SUFFIXES) and not NOTES.fullmatch(path.stem)


def folded(text: str) -> str:
    """``text`` as it compares to others that differ in case or in Unicode's two spellings of accents."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text.casefold())


def spelled(text: str) -> str:
    """``text`` in the one of Unicode's two spellings of accents that is not macOS's."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def shown(names: Iterable[str], count: int, most: int = 3) -> str:
    """The first names of ``count``, and how many more there are."""
    first = [name for name, _ in zip(names, range(most), strict=False)]
    return ", ".join(first) + (f" and {count - len(first)} more" if count > len(first) else "")


def _stem(name: str, kind: EntryKind) -> bytes:
    stem = folded(name)
    base, ending = _split(stem)
    if kind is EntryKind.CAPTION:
        base, ending = _split(stem := base)
    while ending in FORMATS and kind in (EntryKind.CAPTION, EntryKind.IMAGE, EntryKind.BELOW):
        base, ending = _split(stem := base)
    return to_bytes(stem)


def _split(name: str) -> tuple[str, str]:
    """``name`` without its ending, and that; many times faster than with ``Path``."""
    base, dot, ending = name.rpartition(".")
    named = dot and base and not base.endswith("/") and "/" not in ending
    return (base, f".{ending}") if named else (name, "")


def _is_folder(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISDIR(status.st_mode)


def _what(status: os.stat_result | None, entry: os.DirEntry[str]) -> str:
    if status is None:
        return "a link to something that is not there" if entry.is_symlink() else "something that cannot be looked at"
    if stat.S_ISDIR(status.st_mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(status.st_mode) else "a socket" if stat.S_ISSOCK(status.st_mode) else "a device"


def natural_key(name: str) -> bytes:
    """Sorts numbers inside names by value, ignoring case; equal ones by their spelling.

    Names are split into texts and numbers in turn. A text ends in the lowest character; a number is its digits without
    leading zeros after their count, so that as text, too, the longer one is the larger.
    """
    parts = re.split(r"(\d+)", name.casefold())
    texts = [f"{len(str(int(part))):03d}{int(part)}" if part.isdecimal() else f"{part}\0" for part in parts]
    return to_bytes("".join([*texts, "\0", name]))


def images_below(folder: Path, known: Callable[[str], bool] = lambda path: False) -> dict[str, int]:
    """How many image files lie in each folder under ``folder``, by path; links are not followed.

    Args:
        folder: not counted itself.
        known: says of a path that it is not to be counted.
    """
    counts: dict[str, int] = {}
    waiting, left = [folder], MOST_WALKED
    while waiting and left > 0:
        place = waiting.pop(0)
        try:
            with os.scandir(place) as found:
                for entry in found:
                    left -= 1
                    if left < 0:
                        break
                    if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif kind_of(entry.name) is EntryKind.IMAGE and entry.is_file() and not known(entry.path):
                        counts[str(place)] = counts.get(str(place), 0) + 1
        except OSError:  # one that cannot be looked into cannot be meant
            continue
    return counts
