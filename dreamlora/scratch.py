"""Temporary folders for what is the person's own, such as captions: nobody else may look into them (0700).

They go with whoever made them, and at the latest with the process. What a kill leaves is removed when the next one is
made: a lock in the folder, which the system lets go with its process, tells whether that lives.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
import weakref
from pathlib import Path

from filelock import FileLock, Timeout

from dreamlora.files import this_user

PREFIX = "dreamlora-scratch-"
_LOCK = ".lock"
_NEW_S = 60.0
"""So long a folder's lock may be there before it is taken."""


class Scratch:
    """A temporary folder; it is removed when this object goes. Processes that were forked may use it meanwhile.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = FileLock(self.path / _LOCK, fallback_to_soft=False)
        with contextlib.suppress(OSError):  # without locks nobody takes it for abandoned
            lock.acquire(timeout=0)
        self._end = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._end()

    def __reduce__(self) -> tuple[type[Borrowed], tuple[Path]]:
        return Borrowed, (self.path,)


class Borrowed:
    """A scratch folder as it was sent to another process, which does not remove it."""

    def __init__(self, path: Path) -> None:
        self.path = path


def _remove(folder: Path, lock: FileLock, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker drops its copy too
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _remove_abandoned(place: Path) -> None:
    """Remove this user's scratch folders whose processes have ended."""
    for folder in place.glob(PREFIX + "*"):
        try:
            if _may_be_abandoned(folder):
                with FileLock(folder / _LOCK, timeout=0, fallback_to_soft=False):
                    shutil.rmtree(folder, ignore_errors=True)
        except (OSError, Timeout):
            continue


def _may_be_abandoned(folder: Path) -> bool:
    status = folder.lstat()
    ours = this_user() in (None, status.st_uid)
    private = os.name == "nt" or stat.S_IMODE(status.st_mode) == 0o700
    settled = time.time() - status.st_mtime > _NEW_S
    return stat.S_ISDIR(status.st_mode) and ours and private and settled and (folder / _LOCK).is_file()
