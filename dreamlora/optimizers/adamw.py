"""AdamW, torch's own: the baseline every other optimizer is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

DEFAULT_LR: float = 1e-4
# DEFAULT_LR at rank 16 and alpha 16, whose units have the geometric mean ¼; so for all that step like AdamW.
START_LR: float = 4e-4
DEFAULT_WEIGHT_DECAY: float = 1e-2


@dataclass(frozen=True)
class Options:
    """Knobs of AdamW.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    amsgrad: bool = False
    """Divide by the largest second moment so far instead of the present one."""
    fused: bool = True
    """Use torch's fused kernel (the parameters must be on a CPU, CUDA, XPU or MPS device)."""

    def __post_init__(self) -> None:
        _checks.two_fractions("betas", self.betas)
        _checks.at_least_zero("eps", self.eps)
        _checks.switch("amsgrad", self.amsgrad)
        _checks.switch("fused", self.fused)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """AdamW over the groups of ``lora_param_groups``."""
    import torch

    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    optimizer = torch.optim.AdamW(
        plain_groups(param_groups, DEFAULT_LR),
        lr=DEFAULT_LR,
        betas=options.betas,
        eps=options.eps,
        amsgrad=options.amsgrad,
        fused=options.fused,
    )
    return guarded(optimizer)
