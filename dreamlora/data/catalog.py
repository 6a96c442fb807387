"""Rows of a data set on disk, so that memory does not grow with their number.

A row is an image's name, captions and where they are from, hash and size. All rows lie in one SQLite file that lives as
long as the catalogue, and an ``ImageRecord`` is made when it is asked for. Processes that inherit a catalogue, or are
sent one, read the same file.
"""

from __future__ import annotations

import os
import sqlite3
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, overload

import numpy as np

from dreamlora.data.images import ImageFacts, ImageRecord
from dreamlora.data.rgb import Opacity
from dreamlora.scratch import Scratch

_SCHEMA = """
CREATE TABLE rows (id INTEGER PRIMARY KEY, name BLOB, captions TEXT, source BLOB, hash BLOB, width INTEGER,
    height INTEGER, profile_unused INTEGER, opacity INTEGER);
"""
_COLUMNS = "name, captions, hash, width, height, profile_unused, opacity"


class ImageSource(Protocol):
    """Where the image files of a data set are."""

    def reader(self, row: int, name: str) -> Callable[[], bytes]:
        """Gives the bytes of an image file; can be pickled."""

    def where(self, row: int, name: str) -> str:
        """Full path, or data set and row."""

    def stamp(self, row: int, name: str) -> tuple[str, str] | None:
        """What identifies a file and what changes with its content, without reading it; None if that is unknown."""


class Records(Sequence[ImageRecord]):
    """Images in order, each made when it is asked for by ``at``."""

    @abstractmethod
    def at(self, row: int) -> ImageRecord:
        """The record of a row, from 0."""

    @overload
    def __getitem__(self, row: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[ImageRecord]: ...
    def __getitem__(self, row: int | slice) -> ImageRecord | Sequence[ImageRecord]:
        if isinstance(row, slice):
            return RecordSubset(self, range(len(self))[row])
        return self.at(range(len(self))[row])

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.at, range(len(self)))


class Catalog(Records):
    """Images in order; written once (``add``, ``examined``), then read.

    Args:
        place: where the image files are.

    Attributes:
        db: its SQLite connection in this process; whoever fills the catalogue may have tables there.
    """

    def __init__(self, place: ImageSource) -> None:
        self.place = place
        self._scratch = Scratch()
        self._file = self._scratch.path / "rows.sqlite"
        self._connections: dict[int, sqlite3.Connection] = {}
        self._length = 0
        self.db.executescript(_SCHEMA)

    @property
    def db(self) -> sqlite3.Connection:
        """SQLite's connections must not cross a fork: every process opens its own."""
        if os.getpid() not in self._connections:
            connection = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
            # a scratch file: nothing of it has to survive a crash
            connection.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA temp_store=FILE;")
            self._connections[os.getpid()] = connection
        return self._connections[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_connections": {}}

    @contextmanager
    def filling(self) -> Iterator[sqlite3.Connection]:
        """One transaction around many writes: several times faster than one for each."""
        self.db.execute("BEGIN")
        try:
            yield self.db
        finally:
            self.db.execute("COMMIT")

    def add(self, name: str, captions: Sequence[str], source: str = "") -> None:
        """Append a row.

        Args:
            name: of the image.
            captions: at least one, each on one line.
            source: where they are from.
        """
        row = (self._length, os.fsencode(name), "\n".join(captions), to_bytes(source))
        self.db.execute("INSERT INTO rows (id, name, captions, source) VALUES (?, ?, ?, ?)", row)
        self._length += 1

    def source(self, row: int) -> str:
        """Where the captions of a row are from."""
        return to_text(self.db.execute("SELECT source FROM rows WHERE id = ?", (row,)).fetchone()[0])

    def copies(self) -> int:
        """How many rows have an image that an earlier one has, byte for byte, among those that were examined."""
        return int(self.db.execute("SELECT COUNT(hash) - COUNT(DISTINCT hash) FROM rows").fetchone()[0])

    def examined(self, row: int, facts: ImageFacts) -> None:
        """Keep what was found out about a row's image."""
        values = (bytes.fromhex(facts.content_hash), *facts.size, facts.profile_unused, facts.opacity, row)
        columns = "hash = ?, width = ?, height = ?, profile_unused = ?, opacity = ?"
        self.db.execute(f"UPDATE rows SET {columns} WHERE id = ?", values)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows only."""
        self.db.execute("DELETE FROM rows WHERE id >= ?", (length,))
        self._length = min(self._length, length)

    def __len__(self) -> int:
        return self._length

    def at(self, row: int) -> ImageRecord:
        """The record of a row."""
        values = self.db.execute(f"SELECT {_COLUMNS} FROM rows WHERE id = ?", (row,)).fetchone()
        return self._record(row, *values)

    def _record(self, row: int, name: bytes, captions: str, digest: bytes | None, *more: int) -> ImageRecord:
        spelled = os.fsdecode(name)
        caption, *others = captions.split("\n")
        known = None
        if digest is not None:
            known = ImageFacts(digest.hex(), (more[0], more[1]), bool(more[2]), Opacity(more[3]))
        reader, where = self.place.reader(row, spelled), self.place.where(row, spelled)
        return ImageRecord(spelled, caption, reader, where, known, other_captions=tuple(others))


class RecordSubset(Records):
    """Some rows of other records: 8 bytes for each."""

    def __init__(self, records: Sequence[ImageRecord], rows: Iterable[int]) -> None:
        self._records = records
        self._rows: range | array[int] = rows if isinstance(rows, range) else array("q", rows)

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, row: int) -> ImageRecord:
        """The record of a row."""
        return self._records[self._rows[row]]


def to_bytes(text: str) -> bytes:
    """``text`` as SQLite can keep it: names of files that are no Unicode are no text to it."""
    return text.encode("utf-8", "surrogateescape")


def to_text(stored: bytes) -> str:
    """What ``to_bytes`` was given."""
    return stored.decode("utf-8", "surrogateescape")


def hash_prefixes(records: Iterable[ImageRecord]) -> np.ndarray:
    """uint64 ``[n]``: the first 64 bits of every content hash; they sort as the hashes do."""
    return np.fromiter((int(record.content_hash()[:16], 16) for record in records), np.uint64)
