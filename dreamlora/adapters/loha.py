"""LoHa: ``W = W₀ + s (B₁ A₁) ∘ (B₂ A₂)``, rank r² with the numbers of 2 r (FedPara, arXiv 2108.06098; LyCORIS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dreamlora.adapters._scale import Scale, probabilities

NAME: str = "LoHa"
PAIRS: bool = False


@dataclass(frozen=True)
class Options:
    """Settings of LoHa.

    Raises:
        ValueError: a value is out of range.
    """

    rank_dropout: float = 0.0
    """Probability that an output of a layer's change is dropped in training."""
    module_dropout: float = 0.0
    """Probability that a layer's change is left out of a pass in training."""
    use_effective_conv2d: bool = False
    """Split kernels above 1x1 by their sides too (Tucker, LyCORIS' use_tucker)."""

    def __post_init__(self) -> None:
        probabilities(rank_dropout=self.rank_dropout, module_dropout=self.module_dropout)


def config(scale: Scale, targets: Sequence[str], options: Options) -> Any:
    """PEFT's config."""
    from peft import LoHaConfig

    return LoHaConfig(
        r=scale.rank,
        alpha=scale.alpha,  # it may be no whole number, whatever PEFT's type says
        rank_pattern=dict(scale.ranks),
        alpha_pattern=dict(scale.alphas),
        target_modules=list(targets),
        **{option.name: getattr(options, option.name) for option in fields(options)},
    )
