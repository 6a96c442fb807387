"""What a run's config.yaml names outside the run's folder: models, photos, prompt files, ...

The run may be a stranger's, whose config.yaml could name any file of this machine. So ``sample`` and ``evaluate`` open
nothing of that kind unless the person names it by a flag, or says that the runs can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamlora.cli.local_places import FOLDER_OR_HUB, PATHS, is_local
from dreamlora.reading import lies_inside

TRUST = "--trust_runs"


def outside(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options among ``options`` that name places outside ``folder``."""
    return {name: value for name, value in options.items() if value and _leads_out(name, value, folder)}


def _leads_out(name: str, value: Any, folder: Path) -> bool:
    if name == "datasets":
        return any(outside(entry, folder) for entry in value)
    if name in PATHS:
        return value.startswith("~") or not lies_inside(Path(value), folder)
    return name in FOLDER_OR_HUB and is_local(str(value))


def way_in(name: str, value: Any, flag: str | None = None) -> str:
    """What a person does who wants it opened.

    Args:
        name: of the option.
        value: that the run has.
        flag: that says so in this command; None: the option's own.
    """
    return f"give {flag or f'--{name} {value}'}, or {TRUST} if the run is your own"
