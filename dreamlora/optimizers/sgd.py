"""Stochastic gradient descent, torch's own: the baseline of scaled_gd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

# GPT-2 in arXiv 2402.02347 used 9e-2; the embedded model likes 3. Gradients of a mean loss are small: sweep upwards.
DEFAULT_LR: float = 1e-1
# DEFAULT_LR at rank 16 and alpha 16: in these units a step is c_A c_B = 1/16 as long.
START_LR: float = 1.6
DEFAULT_WEIGHT_DECAY: float = 0.0


@dataclass(frozen=True)
class Options:
    """Knobs of SGD.

    Raises:
        ValueError: a value is out of range, or nesterov without momentum.
    """

    momentum: float = 0.0
    """Share of the previous step that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum (needs momentum > 0)."""

    def __post_init__(self) -> None:
        _checks.fraction("momentum", self.momentum)
        _checks.switch("nesterov", self.nesterov)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: got True with momentum 0, must have momentum > 0")


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """SGD over the groups of ``lora_param_groups``; weight decay is torch's (added to the gradient)."""
    import torch

    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    groups = plain_groups(param_groups, DEFAULT_LR)
    return guarded(torch.optim.SGD(groups, lr=DEFAULT_LR, momentum=options.momentum, nesterov=options.nesterov))
