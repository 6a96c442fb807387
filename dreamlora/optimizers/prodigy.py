"""Prodigy: AdamW that finds its learning rate (arXiv 2306.06101), by prodigyopt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

NEEDS = (("prodigyopt",), "prodigy")
# A factor on the rate that Prodigy finds.
DEFAULT_LR: float = 1.0
START_LR: float = 1.0
FINDS_RATE = True
USUAL_LR = (0.05, 20.0)
DEFAULT_WEIGHT_DECAY: float = 1e-2


@dataclass(frozen=True)
class Options:
    """Knobs of Prodigy.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    beta3: float = 0.0
    """Decay of the running estimates of the rate; 0 is the root of the second beta."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    decouple: bool = True
    """Weight decay as in AdamW."""
    use_bias_correction: bool = True
    """Adam's bias correction (the package's own default is off; its authors advise it for diffusion models)."""
    safeguard_warmup: bool = True
    """Keep a warm-up of the learning rate from raising the estimate."""
    d0: float = 1e-6
    """First estimate of the rate; it only grows."""
    d_coef: float = 1.0
    """Factor on the estimate: the knob to turn."""
    growth_rate: float = float("inf")
    """Most that the estimate may grow per step."""

    def __post_init__(self) -> None:
        _checks.two_fractions("betas", self.betas)
        _checks.fraction("beta3", self.beta3)
        for name in ("eps", "d0", "d_coef"):
            _checks.above_zero(name, getattr(self, name))
        for name in ("decouple", "use_bias_correction", "safeguard_warmup"):
            _checks.switch(name, getattr(self, name))
        # inf is no bound, nan is a mistake
        if not (isinstance(self.growth_rate, float | int) and self.growth_rate > 1):
            raise ValueError(f"growth_rate: got {self.growth_rate!r}, must be above 1")


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """Prodigy over the groups of ``lora_param_groups``.

    Raises:
        UserError: prodigyopt is not installed, or groups have different learning rates: it finds one rate for all.
    """
    registry.check_installed(*NEEDS)
    from prodigyopt import Prodigy

    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    groups = plain_groups(param_groups, DEFAULT_LR)
    rates = sorted({float(group.get("lr", DEFAULT_LR)) for group in groups})
    if len(rates) > 1:
        raise UserError(
            f"--optimizer prodigy finds one learning rate for all parameters (got {rates}): leave --text_encoder_lr "
            "and --new_tokens_lr out, and LoRA+ ratios; --learning_rate is a factor on what it finds"
        )
    optimizer = Prodigy(
        groups,
        lr=DEFAULT_LR,
        betas=options.betas,
        beta3=options.beta3 or None,
        eps=options.eps,
        decouple=options.decouple,
        use_bias_correction=options.use_bias_correction,
        safeguard_warmup=options.safeguard_warmup,
        d0=options.d0,
        d_coef=options.d_coef,
        growth_rate=options.growth_rate,
    )
    return guarded(optimizer)
