"""Pipelines of the real classes with a few thousand random weights each, saved as folders; no download.

A module for every family, of the family's name, with its ``TINY``; ``parts`` has what several are made of.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from dreamlora import registry
from tests.tinymodels.flux import save as save_flux
from tests.tinymodels.parts import CLIP_LENGTH, clip_tokenizer
from tests.tinymodels.sd import save as save_sd
from tests.tinymodels.tiny import Seen, Tiny


def of(family: str) -> Tiny:
    """The small model of a family."""
    tiny: Tiny = importlib.import_module(f"tests.tinymodels.{family}").TINY
    return tiny


SAVERS: dict[str, Callable[[Path], Path]] = {name: of(name).save for name in registry.names("families")}
"""How to make a folder for every family."""

__all__ = ["CLIP_LENGTH", "SAVERS", "Seen", "Tiny", "clip_tokenizer", "of", "save_flux", "save_sd"]
