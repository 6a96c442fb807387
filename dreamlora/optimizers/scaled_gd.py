"""Scaled GD: gradient descent preconditioned by the other factor's Gram matrix (arXiv 2402.02347)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks
from dreamlora.optimizers._scaled_options import ScaledOptions, check_gd

if TYPE_CHECKING:
    from torch.optim import Optimizer

# GPT-2 in arXiv 2402.02347 used 2e-2; the embedded model likes 1. Gradients of a mean loss are small: sweep upwards.
DEFAULT_LR: float = 1e-1
# DEFAULT_LR at rank 8 and alpha 8: the weight moves by the square of the scale, which is 1/rank in these units.
START_LR: float = 6.4
DEFAULT_WEIGHT_DECAY: float = 0.0
NEEDS_PAIRS: bool = True


@dataclass(frozen=True)
class Options(ScaledOptions):
    """Knobs of Scaled GD.

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    damping: float = 1e-2
    """Added to the Gram matrices before inversion; with relative damping a fraction of their mean eigenvalue."""
    momentum: float = 0.0
    """Share of the previous scaled step that is kept."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moments of the AdamW that trains what is not in a LoRA pair."""
    eps: float = 1e-8
    """eps of the AdamW that trains what is not in a LoRA pair."""
    fallback_lr: float = 1e-4
    """Learning rate of the AdamW that trains what is not in a LoRA pair; --learning_rate is in units of SGD."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gd(vars(self))
        _checks.two_fractions("betas", self.betas)
        _checks.at_least_zero("eps", self.eps)
        _checks.at_least_zero("fallback_lr", self.fallback_lr)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """Scaled GD over the groups of ``lora_param_groups``; groups without pairs get ``fallback_lr``."""
    from dreamlora.optimizers._groups import with_fallback_lr
    from dreamlora.optimizers._scaled import ScaledGD

    settings = dataclasses.asdict(options)
    groups = with_fallback_lr(param_groups, settings.pop("fallback_lr"))
    return ScaledGD(groups, DEFAULT_LR, **settings)
