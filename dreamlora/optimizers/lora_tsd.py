"""LoRA-TSD: spectral steps in the tangent space of the product, both factors together (arXiv 2609.02734)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

# The spectral norm of the change of BA per step; the paper's rate for a 1B model.
DEFAULT_LR: float = 5e-3
DEFAULT_WEIGHT_DECAY: float = 0.0
NEEDS_PAIRS: bool = True
UNITS_FREE: bool = True


@dataclass(frozen=True)
class Options:
    """Knobs of LoRA-TSD.

    Raises:
        ValueError: a value is out of range.
    """

    momentum: float = 0.9
    """Share of the running mean of gradients that is kept (the paper names none)."""
    projections: int = 3
    """How often the step is made flat and projected on the tangent space (tau; 1 is Riemannion's step)."""
    rank_power: float = 0.25
    """Steps shrink with the rank to the power of minus this; 0 (published) is not at all."""
    layer_power: float = 0.5
    """Steps shrink with the number of pairs over 64, to the power of minus this; 0 (published) is not at all."""
    scale_correction: bool = True
    """Divide steps by alpha/rank, so that the learning rate does not depend on alpha."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moments of the AdamW that trains what is not in a LoRA pair."""
    eps: float = 1e-8
    """eps of the AdamW that trains what is not in a LoRA pair."""
    trust: float = 0.1
    """By how much of its length a step may change a direction of A; 0 (published) is without bound."""
    fallback_lr: float = 1e-4
    """Learning rate of the AdamW that trains what is not in a LoRA pair."""

    def __post_init__(self) -> None:
        _checks.fraction("momentum", self.momentum)
        _checks.whole_number("projections", self.projections, 1)
        _checks.two_fractions("betas", self.betas)
        for name in ("rank_power", "layer_power", "trust", "eps", "fallback_lr"):
            _checks.at_least_zero(name, getattr(self, name))
        _checks.switch("scale_correction", self.scale_correction)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """LoRA-TSD over the groups of ``lora_param_groups``; groups without pairs get ``fallback_lr``."""
    from dreamlora.optimizers._groups import with_fallback_lr
    from dreamlora.optimizers._tsd import LoRATSD

    settings = dataclasses.asdict(options)
    return LoRATSD(with_fallback_lr(param_groups, settings.pop("fallback_lr")), DEFAULT_LR, **settings)
