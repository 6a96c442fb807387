"""Gradient checkpointing as torch has it, without what costs time at every block and changes nothing here."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def enable_checkpointing(denoiser: Any) -> None:
    """Have a denoiser of diffusers compute its blocks anew in the backward pass; what trains in it is there already.

    The state of the random generators is kept for the second pass only if something draws from them (dropout). Whether
    the second pass made tensors of the same shapes is not compared: the same code ran on the same inputs.
    """
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in denoiser.modules())
    denoiser.enable_gradient_checkpointing(functools.partial(_computed_anew, draws))


def _computed_anew(draws: bool, block: nn.Module, *inputs: Any) -> Any:
    if draws:
        return checkpoint(block.__call__, *inputs, use_reentrant=False)
    return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
