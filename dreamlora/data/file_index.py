"""Facts of image files that were decoded before, so that a start does not read all of them again.

An entry counts only for the Pillow that decoded the file (another one may find it broken), and while the file's size
and times are those it had when it was read. The time of the last change of
the inode is among them: programs can set a file's modification time back, but not that. A file that changed within the
last seconds before it was read is not remembered: it might change again without another time stamp.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

import PIL

from dreamlora.data.images import ImageFacts
from dreamlora.errors import WriteError
from dreamlora.files import make_folder, open_at_end

INDEX_FILE = "files.sqlite"
SETTLED_S = 2.0
"""A file must be unchanged for so long before it is remembered; file systems have time stamps as coarse as that."""
_COMMIT_EVERY = 500

_SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    path TEXT PRIMARY KEY, stamp TEXT, decoder TEXT, hash BLOB, width INT, height INT, profile_unused INT
)
"""

logger = logging.getLogger(__name__)


class FileIndex:
    """``<folder>/files.sqlite``; a convenience: where it cannot be read or written, files are read anew.

    Several processes may use it at the same time. Without a folder it knows nothing, and writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._db: sqlite3.Connection | None = None
        self._waiting: list[tuple[str, str, str, bytes, int, int, bool]] = []
        if folder is None:
            return
        try:
            make_folder(folder)
            open_at_end(folder / INDEX_FILE).close()  # SQLite would follow a link, and make it with a mode of its own
            self._db = sqlite3.connect(folder / INDEX_FILE, timeout=10, isolation_level=None)
            self._db.execute(_SCHEMA)
        except (WriteError, sqlite3.Error) as error:
            self._give_up(error)

    def get(self, path: str, stamp: str) -> ImageFacts | None:
        """What is known of a file, if its ``stamp`` is the one it had then, and this Pillow decoded it."""
        if self._db is None:
            return None
        try:
            query = "SELECT hash, width, height, profile_unused FROM images WHERE (path, stamp, decoder) = (?, ?, ?)"
            row = self._db.execute(query, (path, stamp, PIL.__version__)).fetchone()
        except (sqlite3.Error, UnicodeEncodeError) as error:  # a name that is not UTF-8 cannot be looked up
            if isinstance(error, sqlite3.Error):
                self._give_up(error)
            return None
        return ImageFacts(row[0].hex(), (row[1], row[2]), bool(row[3])) if row else None

    def put(self, path: str, stamp: str, facts: ImageFacts) -> None:
        """Remember a file; written when enough have come together, or by ``close``."""
        content_hash = bytes.fromhex(facts.content_hash)
        self._waiting.append((path, stamp, PIL.__version__, content_hash, *facts.size, facts.profile_unused))
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
            self._db.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.execute("COMMIT")
        except UnicodeEncodeError:
            self._db.execute("ROLLBACK")
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("the index of image files cannot be used (%s): all files are read", error)
        self._db = None


def stamp_of(file: Path) -> str | None:
    """What changes whenever the file does; None if it changed a moment ago, or cannot be looked at."""
    try:
        stat = file.stat()
    except OSError:
        return None
    if max(stat.st_mtime, stat.st_ctime) > time.time() - SETTLED_S:
        return None
    return f"{stat.st_size}/{stat.st_mtime_ns}/{stat.st_ctime_ns}/{stat.st_ino}"
