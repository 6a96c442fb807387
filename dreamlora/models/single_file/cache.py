"""Converted files, kept: each is written once, whole or not at all, and found again by what is in the file."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Len
from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from dreamlora.cache_folder import cache_folder, counts, own_place
from dreamlora.errors import UserError, WriteError
from dreamlora.files import make_folder, remove, replacing_folder, write_atomically
from dreamlora.reading import Schema, read_json

logger = logging.getLogger(__name__)

PLACE = "single_files"
MANIFEST = "single_file.json"
"""In a converted folder: what it was made of, and its files with their sizes."""
_MANIFEST_BYTES = 2**20


class _Manifest(TypedDict):
    files: Annotated[dict[str, Annotated[int, Ge(0)]], Len(1, 1000)]


_SCHEMA = Schema(_Manifest)


def kept(file: Path, digest: str, cache_dir: Path | None, write: Callable[[Path], None]) -> Path:
    """The folder that ``write`` makes of a file, made now if it is not there.

    One process writes; others that want the same wait for it.

    Args:
        file: that is converted.
        digest: of all that decides what the folder holds.
        cache_dir: where models are kept; None: the cache.
        write: makes it.

    Raises:
        UserError: from ``write``; or there is too little room.
        WriteError: the system refused.
    """
    cache = cache_dir or cache_folder()
    folder = own_place(cache) / PLACE / digest
    for there in (folder, cache / PLACE / digest):  # the second is that of the cache's owner
        if _is_whole(there, cache):
            return there
    try:
        make_folder(folder.parent)
        with _alone(folder):
            if not _is_whole(folder, cache):
                _make(file, folder, write)
    except WriteError as error:
        error.args = (
            f"cannot keep {file} as a diffusers folder in {folder.parent}: {error.reason}. Make room there, or choose "
            "another place with --cache_dir, or the environment variable DREAMLORA_CACHE",
        )
        raise
    return folder


def _make(file: Path, folder: Path, write: Callable[[Path], None]) -> None:
    for left in folder.parent.glob(f".{folder.name}.*.tmp*"):  # by a process that was killed: nobody else is here
        remove(left)
    needed, free = file.stat().st_size, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise UserError(
            f"{file} is kept as a diffusers folder of about the same size ({_size(needed)}), and {folder.parent} "
            f"has room for {_size(free)}: make room there, or choose another place with --cache_dir"
        )
    logger.info("%s is converted to a diffusers folder, once: %s (%s)", file, folder, _size(needed))
    with replacing_folder(folder) as temporary:
        write(temporary)
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in _files(temporary)}
        write_atomically(temporary / MANIFEST, json.dumps({"made_of": file.name, "files": sizes}, indent=1))


def _is_whole(folder: Path, cache: Path) -> bool:
    """Whether a folder is what was written: programs that tidy up take single files away."""
    manifest = folder / MANIFEST
    try:
        if folder.is_symlink() or not counts(folder.stat().st_uid, cache):
            return False
        sizes = read_json(manifest, _SCHEMA, inside=folder, most=_MANIFEST_BYTES)["files"]
        return sizes == {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder) if path != manifest
        }
    except (OSError, UserError):
        return False


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process writes this folder meanwhile; where the disk has no locks, each writes its own, whole."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process converts the model to %s: waiting for it", folder)
            lock.acquire()
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
