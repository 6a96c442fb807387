"""Muon, torch's own, on every factor by itself (convolutions flattened); LoRA-Muon is the one that knows pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

DEFAULT_LR: float = 1e-3
START_LR: float = 4e-3
DEFAULT_WEIGHT_DECAY: float = 0.0
NEEDS_PAIRS: bool = True


@dataclass(frozen=True)
class Options:
    """Knobs of Muon.

    Raises:
        ValueError: a value is out of range.
    """

    momentum: float = 0.95
    """Share of the running mean of gradients that is kept."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations; they orthogonalise approximately and in bfloat16."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """Factor on the learning rate by shape; match_rms_adamw makes it mean what it means in AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moments of the AdamW that trains what is not in a LoRA pair."""
    eps: float = 1e-8
    """eps of the AdamW that trains what is not in a LoRA pair."""

    def __post_init__(self) -> None:
        _checks.fraction("momentum", self.momentum)
        _checks.switch("nesterov", self.nesterov)
        _checks.whole_number("ns_steps", self.ns_steps, 1, _checks.MOST_NS_STEPS)
        _checks.one_of("adjust_lr_fn", self.adjust_lr_fn, ("original", "match_rms_adamw"))
        _checks.two_fractions("betas", self.betas)
        _checks.at_least_zero("eps", self.eps)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """Muon over the pairs of ``lora_param_groups``, AdamW over the other groups.

    Raises:
        UserError: torch is older than 2.9.
    """
    from dreamlora.optimizers._factor_muon import FactorMuon

    return FactorMuon(
        param_groups,
        DEFAULT_LR,
        momentum=options.momentum,
        nesterov=options.nesterov,
        ns_steps=options.ns_steps,
        adjust_lr_fn=options.adjust_lr_fn,
        betas=options.betas,
        eps=options.eps,
    )
