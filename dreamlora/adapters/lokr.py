"""LoKr: ``W = W₀ + s W₁ ⊗ W₂``, a small factor and a large one, which is split by rank if it pays (LyCORIS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dreamlora.adapters._scale import Scale, probabilities

NAME: str = "LoKr"
PAIRS: bool = False


@dataclass(frozen=True)
class Options:
    """Settings of LoKr.

    Raises:
        ValueError: a value is out of range.
    """

    decompose_factor: int = -1
    """The smaller side of the first factor at most (LyCORIS' factor); -1: near the root of the layer's side."""
    decompose_both: bool = False
    """Split the first factor by rank too."""
    use_effective_conv2d: bool = False
    """Split kernels above 1x1 by their sides too (Tucker, LyCORIS' use_tucker)."""
    rank_dropout: float = 0.0
    """Probability that an output of a layer's change is dropped in training."""
    rank_dropout_scale: bool = False
    """Scale what is left up for that."""
    module_dropout: float = 0.0
    """Probability that a layer's change is left out of a pass in training."""

    def __post_init__(self) -> None:
        probabilities(rank_dropout=self.rank_dropout, module_dropout=self.module_dropout)
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ValueError(f"decompose_factor must be -1 or at least 1 (got {self.decompose_factor})")


def config(scale: Scale, targets: Sequence[str], options: Options) -> Any:
    """PEFT's config."""
    from peft import LoKrConfig

    return LoKrConfig(
        r=scale.rank,
        alpha=scale.alpha,  # it may be no whole number, whatever PEFT's type says
        rank_pattern=dict(scale.ranks),
        alpha_pattern=dict(scale.alphas),
        target_modules=list(targets),
        **{option.name: getattr(options, option.name) for option in fields(options)},
    )
