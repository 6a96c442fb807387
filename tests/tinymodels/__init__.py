"""Pipelines of the real classes with a few thousand random weights each, saved as folders; no download.

A module for every family, of the family's name, with its ``TINY``, and by name in ``VARIANTS`` those of its pipelines
that are otherwise; ``parts`` has what several are made of.
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


def of(name: str) -> Tiny:
    """The small model of a family, or its variant after a hyphen: "flux2-dev"."""
    family, _, variant = name.partition("-")
    module = importlib.import_module(f"tests.tinymodels.{family}")
    tiny: Tiny = module.VARIANTS[variant] if variant else module.TINY
    return tiny


def _names(family: str) -> list[str]:
    variants = getattr(importlib.import_module(f"tests.tinymodels.{family}"), "VARIANTS", {})
    return [family, *(f"{family}-{variant}" for variant in variants)]


SAVERS: dict[str, Callable[[Path], Path]] = {
    name: of(name).save for family in registry.names("families") for name in _names(family)
}
"""How to make a folder for every family, and for its variants."""

__all__ = ["CLIP_LENGTH", "SAVERS", "Seen", "Tiny", "clip_tokenizer", "of", "save_flux", "save_sd"]
