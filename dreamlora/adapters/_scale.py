"""What all kinds of adapters have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Ranks and alphas of the layers of one part of a model.

    Attributes:
        rank, alpha: of layers that no pattern names.
        ranks, alphas: of others, by PEFT's patterns: ends of their names.
        root: divide alpha by the root of the rank (rsLoRA).
        dropout: probability that an input of lora_A is dropped.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool = False
    dropout: float = 0.0


def probabilities(**given: float) -> None:
    """Raises ValueError for what is no probability below 1."""
    for name, value in given.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1 (got {value})")
