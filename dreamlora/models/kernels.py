"""Which of several ways the denoiser's attention and convolutions are computed: the same numbers, but for rounding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.interfaces import Family, ModelSource

_OWN = "native"
"""Torch's own choice, which every denoiser has."""


def arrange(denoiser: Any, source: ModelSource) -> None:
    """Compute a denoiser as is asked for (see ``require``)."""
    if source.attention_backend:
        with attention_backend(_OWN):  # which puts back what held for all models: it is set for this one alone
            denoiser.set_attention_backend(source.attention_backend)
    if source.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    for processor in set(map(type, getattr(denoiser, "attn_processors", {}).values())):
        # diffusers' Attention asks for it at each call, and finding it anew takes longer than a small product
        if call := vars(processor).get("__call__"):
            call.__signature__ = inspect.signature(call)


def avoid_cudnn_attention() -> None:
    """Leave cuDNN's attention, which torch prefers on Hopper and newer GPUs, to those who ask for it by name.

    FLUX.1 in bf16 at batch 1 ended in an illegal memory access there (H200, torch 2.11, cuDNN 9; others report it for
    other models: pytorch/pytorch#190321, #169849). Torch's next choice is FlashAttention.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def require(family: Family, denoiser: nn.Module, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
    """Nothing, if a denoiser can be computed as is asked for.

    Args:
        family: of the denoiser; where prompts have lengths of their own, attention has masks.
        denoiser: with or without numbers.
        source: says what is asked for.
        device: where it is to be computed.
        dtype: that it is computed in.

    Raises:
        UserError: it cannot; the message says what can be had.
    """
    if source.channels_last and not any(_looks_around(module) for module in denoiser.modules()):
        raise UserError(
            f"--channels_last is for convolutions, and {type(denoiser).__name__} has none in its blocks: leave it out"
        )
    if name := source.attention_backend:
        _require_dispatch(denoiser)
        masked = bool(family.LENGTH_AXES)
        if reason := _why_not(name, device, dtype, masked):
            local = [one.value for one in AttentionBackendName if not one.value.endswith("hub")]
            found = [one for one in local if not _why_not(one, device, dtype, masked)]
            raise UserError(
                f"--attention_backend {name}: {reason}. In {str(dtype).removeprefix('torch.')} on {device.type} this "
                f"model can have {', '.join(found)}"
            )


def _looks_around(module: nn.Module) -> bool:
    """Whether this is a convolution, and not one that only cuts an image into patches."""
    return isinstance(module, nn.Conv2d) and module.kernel_size > module.stride


def _require_dispatch(denoiser: nn.Module) -> None:
    if any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in denoiser.modules()):
        return
    unet = "; for xformers there is --enable_xformers_memory_efficient_attention" if _is_unet(denoiser) else ""
    raise UserError(
        f"--attention_backend: {type(denoiser).__name__} always has torch's own choice of attention: leave it out{unet}"
    )


def _is_unet(denoiser: nn.Module) -> bool:
    return any(_looks_around(module) for module in denoiser.modules())


def _why_not(name: str, device: torch.device, dtype: torch.dtype, masked: bool) -> str:
    """Why a little attention cannot be trained in this way; empty: it can."""
    if name not in {one.value for one in AttentionBackendName}:
        return "there is none of this name"
    query, key, value = (torch.ones(1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 1, 64, device=device, dtype=torch.bool) if masked else None
    try:
        with attention_backend(name):
            out: Tensor = dispatch_attention_fn(query, key, value, mask, backend=AttentionBackendName(name))
        if not out.requires_grad:
            return "it has no gradient, and cannot be trained through"
        out.sum().backward()
    except Exception as error:  # a missing package, another device or precision, no masks: each of their own type
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0].rstrip(".") if lines else type(error).__name__
    return ""
