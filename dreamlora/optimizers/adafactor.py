"""Adafactor, torch's own: second moments by row and column (arXiv 1804.04235)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Multiplied by the root mean square of the parameter (at least 1e-3), and at most 1/sqrt(step).
DEFAULT_LR: float = 1e-2
# B's first steps are as long as with DEFAULT_LR at rank 16 and alpha 16; later both move in proportion to themselves.
START_LR: float = 2e-2
DEFAULT_WEIGHT_DECAY: float = 0.0


@dataclass(frozen=True)
class Options:
    """Knobs of Adafactor.

    Raises:
        ValueError: a value is out of range.
    """

    beta2_decay: float = -0.8
    """Exponent of the step in the decay of the second moment, 1 − step^beta2_decay."""
    d: float = 1.0
    """Bound of the root mean square of an update, in units of its learning rate."""

    def __post_init__(self) -> None:
        if not (isinstance(self.beta2_decay, float | int) and -1 <= self.beta2_decay <= 0):
            raise ValueError(f"beta2_decay: got {self.beta2_decay!r}, must be in [-1, 0]")
        _checks.above_zero("d", self.d)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """Adafactor over the groups of ``lora_param_groups``; kernels are factored over their last two dimensions."""
    import torch

    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    groups = plain_groups(param_groups, DEFAULT_LR)
    return guarded(torch.optim.Adafactor(groups, lr=DEFAULT_LR, beta2_decay=options.beta2_decay, d=options.d))
