"""Which options name places of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamlora import tiny
from dreamlora.cli.declared import options_of
from dreamlora.config.programs import PROGRAMS

FOLDER_OR_HUB = (
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "dataset_name"),
    *("clip_model", "dino_model"),
)
"""Options that take a folder of this machine or a name of the hub; of the hub no file of this machine is read."""
PATHS = {name for program in PROGRAMS.values() for name, option in options_of(program).items() if option.kind is Path}
"""Options that take a file or a folder and nothing else."""


def is_local(name: str) -> bool:
    """Whether it stands for a place on this machine: it is there, or can be no ``owner/name`` of the hub."""
    if name in tiny.MODELS:
        return False
    return _is_path(name) or name.count("/") > 1 or name.startswith(".") or ":" in name


def without_places(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that can be told to others: not those whose value is, or holds, a place of this machine."""
    return {name: value for name, value in options.items() if not _tells_place(name, value)}


def _tells_place(name: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_tells_place(key, part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return any(_tells_place(name, part) for part in value)
    if not isinstance(value, str | Path) or not value:
        return False
    text = str(value)
    return name in PATHS or (is_local(text) if name in FOLDER_OR_HUB else _is_path(text))


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~")) or "\\" in text or os.path.exists(text)  # noqa: PTH110  # takes any text
