"""Programs that a benchmark starts as processes of their own: how, and what they find."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def python(words: list[str]) -> list[str]:
    """What this interpreter is to run, as a command."""
    return [sys.executable, *words]


def diffusers_script(file: Path) -> list[str]:
    """One of diffusers' scripts as python is to run it: with a stand-in where torchvision is not installed."""
    return [*([] if has_package("torchvision") else [str(HERE / "_with_standin.py")]), str(file)]


def has_package(name: str) -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec(name) is not None


def environment(threads: int) -> dict[str, str]:
    """What every program finds: its threads, and no network."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
    }
