"""Lion: the sign of a momentum (arXiv 2302.06675), by pytorch_optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora import registry
from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

NEEDS = (("pytorch_optimizer",), "pytorch-optimizer")
# Every entry moves by lr: 3 to 10 times less than AdamW's, with as much more weight decay.
DEFAULT_LR: float = 3e-5
START_LR: float = 1.2e-4
DEFAULT_WEIGHT_DECAY: float = 3e-2


@dataclass(frozen=True)
class Options:
    """Knobs of Lion.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    """Shares of the momentum in the update and in the next momentum."""

    def __post_init__(self) -> None:
        _checks.two_fractions("betas", self.betas)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """Lion over the groups of ``lora_param_groups``.

    Raises:
        UserError: pytorch_optimizer is not installed.
    """
    registry.check_installed(*NEEDS)
    from pytorch_optimizer import Lion

    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    return guarded(Lion(plain_groups(param_groups, DEFAULT_LR), lr=DEFAULT_LR, betas=options.betas))
