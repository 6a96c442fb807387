"""CAME: Adafactor whose step goes by its own confidence (arXiv 2307.02047), by pytorch_optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora import registry
from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

NEEDS = (("pytorch_optimizer",), "pytorch-optimizer")
DEFAULT_LR: float = 1e-4
START_LR: float = 4e-4
DEFAULT_WEIGHT_DECAY: float = 1e-2


@dataclass(frozen=True)
class Options:
    """Knobs of CAME.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the momentum and of the second moment."""
    beta3: float = 0.9999
    """Decay of the residuals that measure confidence."""
    clip_threshold: float = 1.0
    """Bound of the root mean square of an update before momentum."""

    def __post_init__(self) -> None:
        _checks.two_fractions("betas", self.betas)
        _checks.fraction("beta3", self.beta3)
        _checks.above_zero("clip_threshold", self.clip_threshold)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """CAME over the groups of ``lora_param_groups``; kernels are factored over their last two dimensions.

    Raises:
        UserError: pytorch_optimizer is not installed.
    """
    registry.check_installed(*NEEDS)
    from pytorch_optimizer import CAME

    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    optimizer = CAME(
        plain_groups(param_groups, DEFAULT_LR),
        lr=DEFAULT_LR,
        betas=(*options.betas, options.beta3),
        clip_threshold=options.clip_threshold,
    )
    return guarded(optimizer)
