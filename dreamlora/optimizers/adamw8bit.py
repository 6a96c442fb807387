"""AdamW with moments in 8 bits, by bitsandbytes or torchao."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dreamlora import registry
from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

NEEDS = (("bitsandbytes", "torchao"), "bitsandbytes")
DEFAULT_LR: float = 1e-4
START_LR: float = 4e-4
DEFAULT_WEIGHT_DECAY: float = 1e-2


@dataclass(frozen=True)
class Options:
    """Knobs of 8-bit AdamW.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    library: Literal["auto", "bitsandbytes", "torchao"] = "auto"
    """Whose; auto is bitsandbytes if it is installed. torchao compiles its step on first use."""

    def __post_init__(self) -> None:
        _checks.two_fractions("betas", self.betas)
        _checks.at_least_zero("eps", self.eps)
        _checks.one_of("library", self.library, ("auto", "bitsandbytes", "torchao"))


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """8-bit AdamW over the groups of ``lora_param_groups``. Tensors of fewer than 4096 entries keep 32-bit moments.

    Raises:
        UserError: neither package is installed, or not the one that was asked for.
    """
    asked = NEEDS if options.library == "auto" else ((options.library,), options.library)
    package = registry.check_installed(*asked)
    from dreamlora.optimizers._groups import plain_groups
    from dreamlora.optimizers._states import guarded

    AdamW8bit = importlib.import_module(f"{package}.optim").AdamW8bit
    groups = plain_groups(param_groups, DEFAULT_LR)
    return guarded(AdamW8bit(groups, lr=DEFAULT_LR, betas=options.betas, eps=options.eps))
