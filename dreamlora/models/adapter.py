"""Where a LoRA lies that is given by a file, a folder or a name on the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dreamlora.errors import UserError
from dreamlora.models.fetching import Place
from dreamlora.runfolder import LORA_FILE


def find_adapter(name: str, weight_name: str | None, cache_dir: Path | None, flag: str = "--training_adapter") -> Path:
    """The file, or a folder with one in it; fetched if it is on the hub.

    Args:
        name: a file, a folder, or a repository of the hub.
        weight_name: of the file in the folder or repository; None: the only one.
        cache_dir: where downloads are kept.
        flag: that asks, for messages.

    Raises:
        UserError: there is none, several could be meant, or the hub cannot be reached.
    """
    local = Path(name)
    if local.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".safetensors"):
        return local / weight_name if weight_name else local
    place = Place(name, None, cache_dir)
    if weight_name:
        return place.file(weight_name)
    usual = place.optional(LORA_FILE)
    if usual:
        return usual
    files = sorted(file for file in place.listing() if file.endswith(".safetensors") and "/" not in file)
    if len(files) != 1:
        there = ", ".join(files) or "no .safetensors"
        raise UserError(f"{flag} {name}: found {there} there: name one with {flag}_weight_name")
    return place.file(files[0])


def content_of(file: Path) -> str:
    """12 hex digits for what a file holds."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
