"""PEFT's config of a LoRA, with magnitudes or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig

from dreamlora.adapters._scale import Scale


def pair_config(scale: Scale, targets: Sequence[str], **more: Any) -> LoraConfig:
    """A LoRA's config with ``more`` settings."""
    return LoraConfig(
        r=scale.rank,
        lora_alpha=scale.alpha,  # it may be no whole number, whatever PEFT's type says
        rank_pattern=dict(scale.ranks),
        alpha_pattern=dict(scale.alphas),
        use_rslora=scale.root,
        lora_dropout=scale.dropout,
        target_modules=list(targets),
        **more,
    )
