"""Optimizers: one file each, found by name; and classes for any PyTorch project with LoRA layers (PEFT or not).

    from dreamlora.optimizers import ScaledAdamW, lora_param_groups
    optimizer = ScaledAdamW(lora_param_groups(model), lr=2e-4)

Importing this package (or a plug-in file) does not import torch; the names below do, when first used. Nothing here
needs PEFT, diffusers or accelerate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreamlora.optimizers._groups import (
        LoraPair,
        check_compatibility,
        find_lora_pairs,
        group_without_pairs,
        lora_param_groups,
    )
    from dreamlora.optimizers._muon import LoRAMuon
    from dreamlora.optimizers._pairs import LoraPairOptimizer
    from dreamlora.optimizers._rite import LoRARITE
    from dreamlora.optimizers._scaled import ScaledAdamW, ScaledGD
    from dreamlora.optimizers._tsd import LoRATSD
    from dreamlora.optimizers._units import grad_norm, in_units

_HOME = {
    "LoRAMuon": "_muon",
    "LoRARITE": "_rite",
    "LoRATSD": "_tsd",
    "LoraPair": "_groups",
    "LoraPairOptimizer": "_pairs",
    "ScaledAdamW": "_scaled",
    "ScaledGD": "_scaled",
    "check_compatibility": "_groups",
    "find_lora_pairs": "_groups",
    "grad_norm": "_units",
    "group_without_pairs": "_groups",
    "in_units": "_units",
    "lora_param_groups": "_groups",
}

__all__ = [
    "LoRAMuon",
    "LoRARITE",
    "LoRATSD",
    "LoraPair",
    "LoraPairOptimizer",
    "ScaledAdamW",
    "ScaledGD",
    "check_compatibility",
    "find_lora_pairs",
    "grad_norm",
    "group_without_pairs",
    "in_units",
    "lora_param_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
