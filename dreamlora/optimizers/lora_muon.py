"""LoRA-Muon: steps of one size in every direction of the product (arXiv 2606.12921)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

# The spectral norm of the change of BA per step.
DEFAULT_LR: float = 1e-2
DEFAULT_WEIGHT_DECAY: float = 0.0
NEEDS_PAIRS: bool = True
UNITS_FREE: bool = True


@dataclass(frozen=True)
class Options:
    """Knobs of LoRA-Muon.

    Raises:
        ValueError: a value is out of range.
    """

    momentum: float = 0.7
    """Share of the running mean of gradients that is kept."""
    damping: float = 0.0
    """Added to the Gram matrices, a fraction of their mean eigenvalue: shortens steps in weak directions."""
    rank_power: float = 0.25
    """Steps shrink with the rank to the power of minus this, as the best rate does; 0 (the paper's) is not at all."""
    layer_power: float = 0.5
    """Steps shrink with the number of pairs over 64, to the power of minus this; 0 (the paper's) is not at all."""
    scale_correction: bool = True
    """Divide steps by alpha/rank, so that the learning rate does not depend on alpha."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moments of the AdamW that trains what is not in a LoRA pair."""
    eps: float = 1e-8
    """eps of the AdamW that trains what is not in a LoRA pair."""
    trust: float = 0.1
    """By how much of its length a step may change a direction of A; 0 (the paper's) is without bound."""
    refresh: int = 4
    """The matrices that whiten gradients serve for so many steps (after the first 20); 1 makes them anew in each."""
    fallback_lr: float = 1e-4
    """Learning rate of the AdamW that trains what is not in a LoRA pair."""

    def __post_init__(self) -> None:
        _checks.whole_number("refresh", self.refresh, 1)
        _checks.fraction("momentum", self.momentum)
        _checks.two_fractions("betas", self.betas)
        for name in ("damping", "rank_power", "layer_power", "trust", "eps", "fallback_lr"):
            _checks.at_least_zero(name, getattr(self, name))
        _checks.switch("scale_correction", self.scale_correction)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """LoRA-Muon over the groups of ``lora_param_groups``; groups without pairs get ``fallback_lr``."""
    from dreamlora.optimizers._groups import with_fallback_lr
    from dreamlora.optimizers._muon import LoRAMuon

    settings = dataclasses.asdict(options)
    return LoRAMuon(with_fallback_lr(param_groups, settings.pop("fallback_lr")), DEFAULT_LR, **settings)
