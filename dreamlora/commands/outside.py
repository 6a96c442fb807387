"""What a run's config.yaml names outside the run's folder: models, photos, prompt files, ...

The run may be a stranger's, whose config.yaml could name any file of this machine. So ``sample`` and ``evaluate`` open
nothing of that kind unless the person names it by a flag, or says that the runs can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamlora.cli.declared import options_of
from dreamlora.config import EMBEDDED_MODEL
from dreamlora.config.programs import PROGRAMS
from dreamlora.reading import lies_inside

TRUST = "--trust_runs"
FOLDER_OR_HUB = (
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "dataset_name"),
    *("clip_model", "dino_model"),
)
"""Options that take a folder of this machine or a name of the hub; of the hub no file of this machine is read."""
_PATHS = {name for program in PROGRAMS.values() for name, option in options_of(program).items() if option.kind is Path}


def outside(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options among ``options`` that name places outside ``folder``."""
    return {name: value for name, value in options.items() if value and _leads_out(name, value, folder)}


def _leads_out(name: str, value: Any, folder: Path) -> bool:
    if name == "datasets":
        return any(outside(entry, folder) for entry in value)
    if name in _PATHS:
        return value.startswith("~") or not lies_inside(Path(value), folder)
    return name in FOLDER_OR_HUB and value != EMBEDDED_MODEL and _is_local(str(value))


def _is_local(name: str) -> bool:
    """Whether it stands for a place on this machine: it is there, or can be no ``owner/name`` of the hub."""
    path = Path(name)
    return path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name or ":" in name


def way_in(name: str, value: Any, flag: str | None = None) -> str:
    """What a person does who wants it opened.

    Args:
        name: of the option.
        value: that the run has.
        flag: that says so in this command; None: the option's own.
    """
    return f"give {flag or f'--{name} {value}'}, or {TRUST} if the run is your own"
