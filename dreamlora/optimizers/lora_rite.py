"""LoRA-RITE: matrix-preconditioned Adam that does not depend on the factorisation (arXiv 2410.20625)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.optimizers import _checks

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Its unit is the whitened factor's entry; see LoRARITE.
DEFAULT_LR: float = 1e-3
DEFAULT_WEIGHT_DECAY: float = 0.0
NEEDS_PAIRS: bool = True
UNITS_FREE: bool = True


@dataclass(frozen=True)
class Options:
    """Knobs of LoRA-RITE.

    Raises:
        ValueError: a value is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the momentum and of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    clip_unmagnified_grad: float = 1.0
    """Bound of the norm of all whitened gradients together; 0 is none."""
    update_skipping: float = 0.0
    """A factor whose whitened gradient has a larger root mean square is skipped (authors' code: 1); 0 is none."""
    update_capping: float = 0.0
    """Bound of the root mean square of a factor's whitened momentum; 0 is none."""
    apply_escape: bool = False
    """Keep the second moment of directions that leave the basis."""
    scale_correction: bool = True
    """Divide steps by alpha/rank, so that the learning rate does not depend on alpha."""
    trust: float = 0.1
    """By how much of its length a step may change a direction of A; 0 (the authors' code) is without bound."""
    refresh: int = 4
    """The matrices that whiten gradients serve for so many steps (after the first 20); 1 makes them anew in each."""
    rank_power: float = 0.0
    """Steps shrink with the rank to the power of minus this; 0 (the authors' code) is not at all."""
    layer_power: float = 0.0
    """Steps shrink with the number of pairs over 64, to the power of minus this; 0 (the authors' code): not at all."""
    fallback_lr: float = 1e-4
    """Learning rate of the AdamW that trains what is not in a LoRA pair."""

    def __post_init__(self) -> None:
        _checks.whole_number("refresh", self.refresh, 1)
        _checks.two_fractions("betas", self.betas)
        for name in (
            "eps",
            "clip_unmagnified_grad",
            "update_skipping",
            "update_capping",
            "trust",
            "rank_power",
            "layer_power",
            "fallback_lr",
        ):
            _checks.at_least_zero(name, getattr(self, name))
        _checks.switch("apply_escape", self.apply_escape)
        _checks.switch("scale_correction", self.scale_correction)


def build(param_groups: list[dict[str, Any]], options: Options) -> Optimizer:
    """LoRA-RITE over the groups of ``lora_param_groups``; groups without pairs get ``fallback_lr``."""
    from dreamlora.optimizers._groups import with_fallback_lr
    from dreamlora.optimizers._rite import LoRARITE

    settings = dataclasses.asdict(options)
    return LoRARITE(with_fallback_lr(param_groups, settings.pop("fallback_lr")), DEFAULT_LR, **settings)
