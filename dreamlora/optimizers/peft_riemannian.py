"""PEFT's own Riemannian-preconditioned AdamW, to compare scaled_adamw with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.errors import UserError
from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

DEFAULT_LR: float = 2e-4
START_LR: float = 8e-4
DEFAULT_WEIGHT_DECAY: float = 1e-2
NEEDS_PAIRS: bool = True

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Knobs of PEFT's Riemannian AdamW.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    reg: float = 1e-2
    """Added to the Gram matrices before inversion, in their own unit."""

    def __post_init__(self) -> None:
        _checks.two_fractions("betas", self.betas)
        _checks.at_least_zero("eps", self.eps)
        _checks.at_least_zero("reg", self.reg)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """PEFT's optimizer around torch's AdamW over the groups of ``lora_param_groups``.

    It passes over convolutions, which train by plain AdamW; a warning says how many. It changes ``p.grad``.

    Raises:
        UserError: this PEFT has no such optimizer, or no pair is of linear layers.
    """
    import torch

    from dreamlora.optimizers._groups import NamedParameters, plain_groups
    from dreamlora.optimizers._states import guarded

    try:
        from peft.optimizers import create_riemannian_optimizer
    except ImportError:
        raise UserError('--optimizer peft_riemannian needs PEFT 0.21 or newer: pip install -U "peft>=0.21"') from None
    model = NamedParameters(param_groups)
    if model.convolutions:
        logger.warning(
            "peft_riemannian passes over convolutions: %d of %d LoRA pairs are trained by plain AdamW",
            model.convolutions,
            model.pairs,
        )
    if model.convolutions == model.pairs:
        raise UserError("--optimizer peft_riemannian knows linear layers only, and no LoRA pair is of one")
    settings: dict[str, Any] = {"betas": options.betas, "eps": options.eps}
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=DEFAULT_LR, reg=options.reg, **settings)
    optimizer.param_groups.clear()  # it made one group; ours have their own rates
    for group in plain_groups(param_groups, DEFAULT_LR):
        optimizer.add_param_group(group)
    return guarded(optimizer)
