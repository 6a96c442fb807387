"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

Torch and setuptools are as constraints.txt has them.

    python tools/lower_bounds.py > lower_bounds.txt

``make test-oldest`` runs the tests with these, so that the bounds stay true.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRA = "dev"
KEPT = ("torch==", "setuptools==")
"""They stay those of constraints.txt: torch, and what builds this package."""


def lower_bounds(pyproject: str, constraints: str) -> list[str]:
    """``name==version`` of every dependency and of those of the tests.

    Raises:
        ValueError: a dependency is not of the form ``name>=version``.
    """
    project = tomllib.loads(pyproject)["project"]
    pins = [line for line in constraints.splitlines() if line.startswith(KEPT)]
    for requirement in [*project["dependencies"], *project["optional-dependencies"][EXTRA]]:
        name, bound, version = re.match(r"([\w.-]+)(>=)?(.*)", requirement).groups()
        if name == "torch" or (not bound and name.startswith("types-")):
            continue
        if not bound or not re.fullmatch(r"[\d.]+", version):
            raise ValueError(f"{requirement!r} has no lower bound: write name>=version")
        pins.append(f"{name}=={version}")
    return pins


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    print("\n".join(lower_bounds(*texts)))
