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
        """Add a commit with what the folder ``content`` holds, as links to blobs, and let the branch point to it."""
        snapshot = self._place(repository) / "snapshots" / commit
        blobs = self._place(repository) / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        for file in sorted(path for path in content.rglob("*") if path.is_file()):
            blob = blobs / f"{len(list(blobs.iterdir())):064x}"
            shutil.copy(file, blob)
            link = snapshot / file.relative_to(content)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(*[".."] * (len(link.relative_to(blobs.parent).parts) - 1), "blobs", blob.name))
        self.move(repository, commit)
        return snapshot

    def move(self, repository: str, commit: str) -> None:
        """Let the branch main point to a commit, as a push does that another process has fetched."""
        branch = self._place(repository) / "refs" / "main"
        branch.parent.mkdir(parents=True, exist_ok=True)
        branch.write_text(commit, encoding="utf-8")

    def _place(self, repository: str) -> Path:
        return self.cache / f"models--{repository.replace('/', '--')}"
