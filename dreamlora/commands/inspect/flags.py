"""``dreamlora inspect``: its flags. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InspectConfig:
    """Say what a LoRA or another .safetensors file is, without loading a model: dreamlora inspect <file or run>."""

    file: Path
    """A .safetensors file, a folder with one, or a run; the flag's name may be left out."""
    json: bool = False
    """Print JSON instead of text; docs/inspect.md describes it."""
