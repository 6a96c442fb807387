"""Plug-ins by file: the folder is the kind, the file name is the name.

A new optimizer (family, ...) is one new file; there is no list to update. Files that begin with an underscore are
support code of that folder, not plug-ins.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from types import ModuleType

from dreamlora.errors import UserError

_PACKAGE = Path(__file__).parent


def names(kind: str) -> list[str]:
    """The plug-ins of the folder ``dreamlora/<kind>``, sorted; found without importing any of them."""
    return sorted(file.stem for file in (_PACKAGE / kind).glob("*.py") if not file.stem.startswith("_"))


def check(kind: str, name: str) -> str:
    """``name`` as the registry spells it (case and hyphens do not matter).

    Raises:
        UserError: no such plug-in; the message lists the choices and the nearest one.
    """
    choices = names(kind)
    spelled = name.lower().replace("-", "_")
    if spelled in choices:
        return spelled
    near = difflib.get_close_matches(spelled, choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown name {name!r} among the {kind}: choose one of {', '.join(choices)}.{hint}")


def load(kind: str, name: str) -> ModuleType:
    """The plug-in's module.

    Raises:
        UserError: no such plug-in.
    """
    return importlib.import_module(f"dreamlora.{kind}.{check(kind, name)}")
