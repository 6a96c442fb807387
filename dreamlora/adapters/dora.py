"""DoRA: ``W = m ∘ (W₀ + s B A) / ‖W₀ + s B A‖``, by rows, with magnitudes m that train too (arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dreamlora.adapters._scale import Scale

NAME: str = "DoRA"
PAIRS: bool = True


@dataclass(frozen=True)
class Options:
    """No settings."""


def config(scale: Scale, targets: Sequence[str], options: Options) -> Any:
    """PEFT's config."""
    from dreamlora.adapters._pairs import pair_config

    return pair_config(scale, targets, use_dora=True)
