"""LoRA+: AdamW with a larger learning rate for B than for A (arXiv 2402.12354)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Of the A factors. About half of AdamW's, since B moves faster.
DEFAULT_LR: float = 5e-5
START_LR: float = 2e-4
DEFAULT_WEIGHT_DECAY: float = 1e-2
NEEDS_PAIRS: bool = True


@dataclass(frozen=True)
class Options:
    """Knobs of LoRA+.

    Raises:
        ValueError: a value is out of range.
    """

    ratio: float = 16.0
    """Learning rate of B divided by that of A."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    fused: bool = True
    """Use torch's fused kernel (the parameters must be on a CPU, CUDA, XPU or MPS device)."""

    def __post_init__(self) -> None:
        _checks.above_zero("ratio", self.ratio)
        _checks.two_fractions("betas", self.betas)
        _checks.at_least_zero("eps", self.eps)
        _checks.switch("fused", self.fused)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """torch's AdamW, the B factors in groups of their own; a group's ``lr_ratio_B`` multiplies the ratio."""
    import torch

    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    groups = [
        {**g, "lr_ratio_B": options.ratio * g.get("lr_ratio_B", 1.0)} if g.get("lora_pairs") else g
        for g in param_groups
    ]
    optimizer = torch.optim.AdamW(
        plain_groups(groups, DEFAULT_LR), lr=DEFAULT_LR, betas=options.betas, eps=options.eps, fused=options.fused
    )
    return guarded(optimizer)
