"""LoRAs that start away from zero on an untouched base: what counts is how far B A has moved from its start B₀ A₀.

PiSSA, OLoRA and LoRA-GA start with B₀ A₀ ≠ 0 and subtract it from the base weights, so that the model is unchanged at
first. Rounded to bf16 such a base is no longer the one that everybody has, and the saved LoRA is wrong on it. Here the
base is never touched. A layer computes ``W₀ x + s·ΔW x`` with

    ΔW = B A − B₀ A₀ = [B, B − B₀] [A − A₀ ; A₀]

The right-hand form is a LoRA of rank 2r: exactly zero at the start in any precision, without cancellation later, and
what is exported, since every program can load it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

_START = "frozen_start"


class FrozenStart(nn.Module):
    """A₀ and B₀ of one layer, in the shapes of its lora_A and lora_B weights; they do not train."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        # not persistent: PEFT would take them for a part of the adapter
        self.register_buffer("A", A.detach().clone(), persistent=False)
        self.register_buffer("B", B.detach().clone(), persistent=False)

    def down(self, A: Tensor) -> Tensor:
        """``[A − A₀ ; A₀]``: ``(r, n, ...) -> (2r, n, ...)``."""
        return torch.cat([A - self.A, self.A])

    def up(self, B: Tensor) -> Tensor:
        """``[B, B − B₀]``: ``(m, r, ...) -> (m, 2r, ...)``."""
        return torch.cat([B, B - self.B], dim=1)


class OffsetVariant(LoraVariant):
    """PEFT's hook for another forward pass: both halves of ΔW see the same dropped input."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result + s·ΔW dropout(x)``."""
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        start = getattr(module, _START)
        hidden = apply_weight(A, module.lora_dropout[active_adapter](x), start.down(A.weight))
        return result + apply_weight(B, hidden, start.up(B.weight)) * module.scaling[active_adapter]


def apply_weight(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What a Linear or Conv2d without bias gives with another weight in the place of its own."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight)


def attach(layer: Any, adapter: str, start: FrozenStart) -> None:
    """Make PEFT's ``layer`` compute with its distance from ``start``."""
    setattr(layer, _START, start)
    layer.lora_variant[adapter] = OffsetVariant()


def start_of(layer: Any) -> FrozenStart | None:
    """The layer's frozen start, if it has one."""
    start: FrozenStart | None = getattr(layer, _START, None)
    return start
