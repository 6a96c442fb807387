"""Facts of image files that were decoded before, so that a start does not read all of them again.

An entry counts only for the Pillow that decoded the file (another one may find it broken), and while the file's size
and times are those it had when it was read. The time of the last change of
the inode is among them: programs can set a file's modification time back, but not that. A file that changed within the
last seconds before it was read is not remembered: it might change again without another time stamp.

The index is believed if it is a regular file of a user whose word counts (``cache_folder``) and holds nothing but the
table that is written here; each row has the types and bounds of its kind.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import stat
import time
from pathlib import Path

import PIL

from dreamlora.cache_folder import counts, own_place
from dreamlora.data.images import ImageFacts
from dreamlora.data.rgb import Opacity
from dreamlora.errors import WriteError
from dreamlora.files import make_folder, open_at_end
from dreamlora.pictures import LONGEST

INDEX_FILE = "image_facts.sqlite"
"""Another name than older versions have, whose tables are others."""
SETTLED_S = 2.0
"""A file must be unchanged for so long before it is remembered; file systems have time stamps as coarse as that."""
_COMMIT_EVERY = 500
_LONGEST_VALUE = 2**16
"""Of a value in bytes; paths have some thousand."""

_TABLE = """CREATE TABLE images (
    path TEXT PRIMARY KEY, stamp TEXT, decoder TEXT, hash BLOB, width INT, height INT, profile_unused INT,
    opacity INT
)"""
_FACTS = "hash, width, height, profile_unused, opacity"
_SCHEMA = {("table", "images", _TABLE), ("index", "sqlite_autoindex_images_1", None)}

logger = logging.getLogger(__name__)


class FileIndex:
    """``<folder>/image_facts.sqlite``; a convenience: where it cannot be read or written, files are read anew.

    Several processes may use it at the same time. Without a folder it knows nothing, and writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._db: sqlite3.Connection | None = None
        self._waiting: list[tuple[str, str, str, bytes, int, int, bool, int]] = []
        if folder is None:
            return
        try:
            self._db = _connected(folder)
        except (WriteError, OSError, ValueError, sqlite3.Error) as error:
            self._give_up(error)

    def get(self, path: str, stamp: str) -> ImageFacts | None:
        """What is known of a file, if its ``stamp`` is the one it had then, and this Pillow decoded it."""
        if self._db is None:
            return None
        try:
            query = f"SELECT {_FACTS} FROM images WHERE (path, stamp, decoder) = (?, ?, ?)"
            row = self._db.execute(query, (path, stamp, PIL.__version__)).fetchone()
        except (sqlite3.Error, UnicodeEncodeError) as error:  # a name that is not UTF-8 cannot be looked up
            if isinstance(error, sqlite3.Error):
                self._give_up(error)
            return None
        return _facts(*row) if row else None

    def put(self, path: str, stamp: str, facts: ImageFacts) -> None:
        """Remember a file; written when enough have come together, or by ``close``."""
        content_hash = bytes.fromhex(facts.content_hash)
        found = (content_hash, *facts.size, facts.profile_unused, facts.opacity)
        self._waiting.append((path, stamp, PIL.__version__, *found))
        if len(self._waiting) >= _COMMIT_EVERY:
            self._write()

    def close(self) -> None:
        """Write what was remembered."""
        self._write()
        if self._db is not None:
            self._db.close()

    def _write(self) -> None:
        rows, self._waiting = self._waiting, []
        if self._db is None or not rows:
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")
        except UnicodeEncodeError:
            self._db.execute("ROLLBACK")
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("the index of image files cannot be used (%s): all files are read", error)
        self._db = None


def _connected(folder: Path) -> sqlite3.Connection:
    """The index of a cache, made if it is not there.

    Raises:
        WriteError, OSError, ValueError, sqlite3.Error: it cannot be made, or cannot be believed.
    """
    place = make_folder(own_place(folder))
    file = place / INDEX_FILE
    for beside in (file, *(file.with_name(INDEX_FILE + end) for end in ("-journal", "-wal", "-shm"))):
        _require_own(beside, folder)
    open_at_end(file).close()  # SQLite would follow a link, and make it with a mode of its own
    db = sqlite3.connect(file, timeout=10, isolation_level=None)
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    db.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS", 1))
    if set(db.execute("SELECT type, name, sql FROM sqlite_master")) != _SCHEMA:
        raise ValueError(f"{file} holds other things than the index: remove it")
    return db


def _require_own(file: Path, folder: Path) -> None:
    try:
        status = file.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file} is a link, or no file")
    if not counts(status.st_uid, folder):
        raise ValueError(f"{file} was written by another user")


def _facts(digest: object, width: object, height: object, profile_unused: object, opacity: object) -> ImageFacts | None:
    """What a row says, if it is of its kind."""
    if not isinstance(digest, bytes) or len(digest) != hashlib.sha256().digest_size or profile_unused not in (0, 1):
        return None
    if not all(isinstance(side, int) and 0 < side < LONGEST for side in (width, height)):
        return None
    if not isinstance(opacity, int) or opacity not in set(Opacity):
        return None
    return ImageFacts(digest.hex(), (width, height), bool(profile_unused), Opacity(opacity))  # type: ignore[arg-type]


def stamp_of(file: Path) -> str | None:
    """What changes whenever the file does; None if it changed a moment ago, or cannot be looked at."""
    try:
        status = file.stat()
    except OSError:
        return None
    if max(status.st_mtime, status.st_ctime) > time.time() - SETTLED_S:
        return None
    return f"{status.st_size}/{status.st_mtime_ns}/{status.st_ctime_ns}/{status.st_ino}"
