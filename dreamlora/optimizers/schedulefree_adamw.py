"""Schedule-Free AdamW: an average of the path in place of a schedule (arXiv 2405.15682), by schedulefree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora import registry
from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

NEEDS = (("schedulefree",), "schedulefree")
# 1 to 10 times AdamW's, as its authors found.
DEFAULT_LR: float = 3e-4
START_LR: float = 1.2e-3
OWN_SCHEDULE = True
DEFAULT_WEIGHT_DECAY: float = 1e-2


@dataclass(frozen=True)
class Options:
    """Knobs of Schedule-Free AdamW. It wants no schedule: leave --lr_scheduler at constant.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """How far gradients are taken towards the average, and decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    r: float = 0.0
    """Exponent of the step in the weights of the average."""
    weight_lr_power: float = 2.0
    """Exponent of the learning rate in the weights of the average."""

    def __post_init__(self) -> None:
        _checks.two_fractions("betas", self.betas)
        _checks.above_zero("first of betas", self.betas[0])
        for name in ("eps", "r", "weight_lr_power"):
            _checks.at_least_zero(name, getattr(self, name))
        _checks.whole_number("warmup_steps", self.warmup_steps, 0)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """Schedule-Free AdamW over the groups of ``lora_param_groups``, in training mode.

    ``optimizer.eval()`` puts the average into the parameters, which is what to measure and save; ``train()`` takes it
    out again.

    Raises:
        UserError: schedulefree is not installed.
    """
    registry.check_installed(*NEEDS)
    from schedulefree import AdamWScheduleFree

    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    optimizer = AdamWScheduleFree(
        plain_groups(param_groups, DEFAULT_LR),
        lr=DEFAULT_LR,
        betas=options.betas,
        eps=options.eps,
        warmup_steps=options.warmup_steps,
        r=options.r,
        weight_lr_power=options.weight_lr_power,
    )
    optimizer.train()
    return guarded(optimizer)
