"""Scaled AdamW: AdamW on gradients preconditioned by the other factor's Gram matrix (arXiv 2402.02347)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks
from dreamlora.optimizers._scaled_options import BiasCorrection, ScaledOptions, check_adamw

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Twice AdamW's: the best rate was 2-4 times AdamW's where both were swept (GPT-2 in the paper's instructions; our
# embedded model). A symptom and no merit: the scaling shortens steps along what the factors have learnt already.
DEFAULT_LR: float = 2e-4
# AdamW's: in these units both have the same best rate on both embedded models (benchmarks/robustness.py).
START_LR: float = 4e-4
DEFAULT_WEIGHT_DECAY: float = 1e-2
NEEDS_PAIRS: bool = True


@dataclass(frozen=True)
class Options(ScaledOptions):
    """Knobs of Scaled AdamW.

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    bias_correction: BiasCorrection = "torch"
    """absolute: torch's, as in the paper's program for DreamBooth; folded into the rate (GPT-2's); none (others')."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.two_fractions("betas", self.betas)
        _checks.at_least_zero("eps", self.eps)
        check_adamw(vars(self))


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """Scaled AdamW over the groups of ``lora_param_groups``."""
    from dreamlora.optimizers._scaled import ScaledAdamW

    return ScaledAdamW(param_groups, DEFAULT_LR, **dataclasses.asdict(options))
