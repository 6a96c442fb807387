"""Where what is kept between runs lies, and whose word counts there.

A cache is its folder's owner's. What counts in it was written by that user, by the one who runs, or by root: nobody
else's, for a right checksum says nothing about who made an entry. Who is not the owner keeps things in a folder below
it, so that users do not replace each other's. Where files have no owners (Windows), all counts.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

ROOT = 0

logger = logging.getLogger(__name__)


def cache_folder(latents_cache_dir: Path | None = None) -> Path:
    """``latents_cache_dir``, or the environment's DREAMLORA_CACHE, or ~/.cache/dreamlora."""
    return Path(latents_cache_dir or os.environ.get("DREAMLORA_CACHE") or Path.home() / ".cache" / "dreamlora")


def own_place(folder: Path) -> Path:
    """Where in a cache the user who runs keeps things: the folder itself, or ``users/<number>`` in somebody else's."""
    user, owner = this_user(), owner_of(folder)
    if user is None or owner is None or user == owner:
        return folder
    own = folder / "users" / str(user)
    if owner != ROOT:
        _tell(
            f"the cache {folder} belongs to another user (number {owner}): what that user put there is used as it is; "
            f"what this run adds is kept in {own}"
        )
    return own


def counts(owner: int, folder: Path) -> bool:
    """Whether what a user wrote counts in a cache; tells once of one whose does not."""
    user = this_user()
    if user is None or owner in (user, ROOT, owner_of(folder)):
        return True
    _tell(f"what another user (number {owner}) wrote into the cache {folder} does not count: it is made anew")
    return False


def this_user() -> int | None:
    """The number of the user who runs; None where there are none."""
    ask = getattr(os, "geteuid", None)
    return ask() if ask else None


def owner_of(folder: Path) -> int | None:
    """The number of a folder's owner; None if it is not there."""
    try:
        return _owner(folder)
    except OSError:
        return None


@functools.cache
def _owner(folder: Path) -> int:
    """It is asked for every entry, and stays."""
    return folder.stat().st_uid


@functools.cache
def _tell(text: str) -> None:
    logger.warning(text)
