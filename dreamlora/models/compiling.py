"""The denoiser's repeated blocks, compiled for the training step by ``torch.compile``.

Blocks of one class share what is compiled: one graph forwards and one backwards for each shape of their inputs. Only
what trains is compiled. Drawing and measuring compute as without, so that samples, losses and the check of the LoRA's
file are the same numbers that ``sample`` and ``evaluate`` give, and no graph is made for a few calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dreamlora.errors import UserError

MOST = 256
"""Graphs that are made for a class of blocks; a batch of yet another shape is computed without one."""
PER_SHAPE = 2
"""Graphs for a shape: the first block's input has no gradient, and all others' has one."""


def repeated_blocks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """What a model consists of again and again: what its class names; else the entries of its own lists."""
    named = set(getattr(denoiser, "_repeated_blocks", None) or ())
    if named:
        yield from (module for module in denoiser.modules() if type(module).__name__ in named)
    else:
        yield from (block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child)


def compile_blocks(denoiser: nn.Module, shapes: int) -> None:
    """Compile the blocks in place, whose names and parameters stay as they are: when they are next trained.

    Args:
        denoiser: with its LoRA, which is compiled with it.
        shapes: of its inputs that are to come, at most; every further one is computed without a graph.
    """
    blocks = list(repeated_blocks(denoiser))
    graphs = min(MOST, shapes * PER_SHAPE * len({_layout(block) for block in blocks}))
    config: Any = torch._dynamo.config  # by names of torch 2.6, which newer ones know beside their own
    config.cache_size_limit = max(config.cache_size_limit, graphs)
    config.accumulated_cache_size_limit = max(config.accumulated_cache_size_limit, MOST)
    for block in blocks:
        block.forward = _in_training(block.forward)


def _layout(block: nn.Module) -> tuple[Any, ...]:
    """Blocks of the same one share graphs."""
    return tuple(
        (type(module).__name__, tuple(p.shape for p in module._parameters.values() if p is not None))
        for module in block.modules()
    )


def _in_training(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=False)

    @functools.wraps(forward)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return either


def require_compiler(device: torch.device) -> None:
    """Nothing, if a small function can be compiled and gives a gradient.

    Raises:
        UserError: it cannot.
    """

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() + 1).sum()

    try:
        torch.compile(function, dynamic=False)(torch.ones(4, device=device, requires_grad=True)).backward()
    except Exception as error:  # whatever is missing on this machine: a compiler, its headers, triton
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        needs = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
        raise UserError(
            f"--compile: torch.compile does not work here: {reason}. On this device it needs {needs}. Install it, or "
            "leave the flag out"
        ) from error
