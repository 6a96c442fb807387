"""Plug-ins by file: the folder is the kind, the file name is the name.

A new optimizer (family, ...) is one new file; there is no list to update. Files that begin with an underscore are
support code of that folder, not plug-ins.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from dreamlora.errors import UserError

_PACKAGE = Path(__file__).parent


def names(kind: str) -> list[str]:
    """The plug-ins of the package ``dreamlora.<kind>``, sorted; found without importing any of them."""
    return sorted(
        file.stem for file in (_PACKAGE / kind.replace(".", "/")).glob("*.py") if not file.stem.startswith("_")
    )


def check(kind: str, name: str) -> str:
    """``name`` as the registry spells it (case, hyphens and underscores do not matter).

    Raises:
        UserError: no such plug-in; the message lists the choices and the nearest one.
    """
    choices = names(kind)
    spelled = name.lower().replace("-", "_")
    for choice in choices:
        if choice.replace("_", "") == spelled.replace("_", ""):
            return choice
    near = difflib.get_close_matches(spelled, choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown name {name!r} among the {kind}: choose one of {', '.join(choices)}.{hint}")


def load(kind: str, name: str) -> ModuleType:
    """The plug-in's module.

    Raises:
        UserError: no such plug-in.
    """
    return importlib.import_module(f"dreamlora.{kind}.{check(kind, name)}")


def name_of(plugin: Any) -> str:
    """What ``load`` calls a plug-in's module."""
    name: str = plugin.__name__.rpartition(".")[2]
    return name


def check_needs(kind: str, name: str) -> None:
    """Whether the packages are installed that a plug-in names in ``NEEDS``, the arguments of ``check_installed``.

    Raises:
        UserError: one is missing.
    """
    needs = getattr(load(kind, name), "NEEDS", None)
    try:
        if needs:
            check_installed(*needs)
    except UserError as error:
        raise UserError(f"--{kind.removesuffix('s')} {name}: {error}") from None


def check_installed(packages: tuple[str, ...], extra: str) -> str:
    """The first of these packages that is installed; any of them will do. Nothing is imported.

    Args:
        packages: as they are imported.
        extra: of dreamlora, which installs the first one.

    Raises:
        UserError: none is.
    """
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            return package
    raise UserError(f'this needs the package {" or ".join(packages)}: pip install "dreamlora[{extra}]"')
