"""A cache of the hub as huggingface_hub lays it out, with commits and a branch that moves; no network."""

from __future__ import annotations

import shutil
from pathlib import Path


class FakeHub:
    """Repositories in a cache folder.

    Args:
        cache: what ``cache_dir`` is to be.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def commit(self, repository: str, commit: str, content: Path) -> Path:
        """Add a commit with what the folder ``content`` holds, and let the branch point to it."""
        snapshot = self._place(repository) / "snapshots" / commit
        shutil.copytree(content, snapshot)
        self.move(repository, commit)
        return snapshot

    def move(self, repository: str, commit: str) -> None:
        """Let the branch main point to a commit, as a push does that another process has fetched."""
        branch = self._place(repository) / "refs" / "main"
        branch.parent.mkdir(parents=True, exist_ok=True)
        branch.write_text(commit, encoding="utf-8")

    def _place(self, repository: str) -> Path:
        return self.cache / f"models--{repository.replace('/', '--')}"
