"""The lowest versions that pyproject.toml allows: all are stated, and the pinned ones lie above them."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version

from tools.lower_bounds import lower_bounds

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
BOUNDS = lower_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8"), CONSTRAINTS)


def test_the_pinned_versions_lie_above_the_lower_bounds() -> None:
    pinned = {name.lower(): version for name, _, version in (line.partition("==") for line in CONSTRAINTS.split())}
    for bound in BOUNDS:
        name, _, version = bound.partition("==")
        assert Version(pinned[name.lower().replace("pytorch-optimizer", "pytorch_optimizer")]) >= Version(version), name


def test_a_dependency_without_a_bound_is_refused() -> None:
    project = '[project]\ndependencies = ["torch>=2.6", "{}"]\noptional-dependencies = {{dev = []}}'
    assert lower_bounds(project.format("numpy>=1.26"), "torch==9.9\nx==1") == ["torch==9.9", "numpy==1.26"]
    for wrong in ("numpy", "numpy<2", "numpy>=1.26,<2"):
        with pytest.raises(ValueError, match="has no lower bound"):
            lower_bounds(project.format(wrong), "")
