"""What a run with ``--vram`` computes in where nobody has said it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_bf16_available

from dreamlora.config import RunConfig

AMPERE = 8
"""The first of NVIDIA's generations that computes bf16; older ones go a slow way around."""


def with_precision(config: RunConfig, earlier: Mapping[str, Any]) -> RunConfig:
    """With ``--vram``, what the run that is resumed computed in; in a new one bf16, if the device computes it.

    Args:
        config: of the run; what it says of the precision stays.
        earlier: options of the run that is resumed; empty: none is.
    """
    if config.model.vram is None or config.model.mixed_precision or _launcher_says():
        return config
    word: Any = earlier.get("mixed_precision") or ("bf16" if _computes_bf16() else None)
    return replace(config, model=replace(config.model, mixed_precision=word))


def chosen(config: RunConfig) -> dict[str, str]:
    """The precision of a run with ``--vram``, as an option; empty: it was said, or is the usual one."""
    word = config.model.mixed_precision
    said = "mixed_precision" in config.given or _launcher_says()
    return {} if said or word in (None, "no") else {"mixed_precision": word}


def _launcher_says() -> bool:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"


def _computes_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))[0] >= AMPERE
    return is_bf16_available(ignore_tpu=True)
