"""LoRA: ``W = W₀ + s B A`` (arXiv 2106.09685), with ``s = alpha / r``, or ``alpha / √r`` (rsLoRA, arXiv 2312.03732)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dreamlora.adapters._scale import Scale

NAME: str = "LoRA"
PAIRS: bool = True


@dataclass(frozen=True)
class Options:
    """No settings."""


def config(scale: Scale, targets: Sequence[str], options: Options) -> Any:
    """PEFT's config."""
    from dreamlora.adapters._pairs import pair_config

    return pair_config(scale, targets)
