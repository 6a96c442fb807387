"""A Linear layer and its LoRA as one operation: fewer and cheaper steps than one by one, with the same result.

PEFT computes ``y = W x + b``, then ``y + (B (A x))·s``. The product with s and the sum are passes over the whole y,
forwards and backwards, and autograd adds up the gradients of both branches in another. Here B's product is accumulated
into y, and A's into the gradient of x (``addmm_``), so that none of these passes is left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

from dreamlora.lora.pairs import ADAPTER
from dreamlora.precision import QuantizedLinear, dense_weight, product


class FusedLinear(Linear):
    """PEFT's LoRA layer with another forward pass, wherever that computes the same.

    Everything that the fused pass does not know goes to PEFT's own: dropout, other or several adapters, adapters that
    are switched off or merged, variants (DoRA, frozen starts), hooks on the base layer, a base layer that trains, and
    inputs in another precision than the base weights.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``W x + b + s·B A x`` of x ``(..., n)``: ``(..., m)``, in the precision of the base weights."""
        if args or kwargs or not self._is_plain(x):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base, scale, dtype = self.base_layer, self.scaling[ADAPTER], self._precision
        A, B = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        fused: Tensor = _LoraLinear.apply(x.to(dtype), base, A.to(dtype), (B if scale == 1 else scale * B).to(dtype))
        return fused

    @property
    def _precision(self) -> torch.dtype:
        """Of the base layer's computation."""
        base = self.base_layer
        return base.dtype if isinstance(base, QuantizedLinear) else base.weight.dtype

    def _is_plain(self, x: Tensor) -> bool:
        if ADAPTER not in self.lora_A:
            return False
        base, device = self.base_layer, x.device.type
        if not x.is_meta and torch.is_autocast_enabled(device):  # torch knows no autocast of meta tensors
            same_precision = self._precision == torch.get_autocast_dtype(device)
        else:
            same_precision = x.dtype == self._precision == self.lora_A[ADAPTER].weight.dtype
        return (
            same_precision
            and self.active_adapters == [ADAPTER]
            and not self.disable_adapters
            and not self.merged
            and not self.lora_variant
            and not (self.training and isinstance(self.lora_dropout[ADAPTER], nn.Dropout))
            and not any(parameter.requires_grad for parameter in base._parameters.values() if parameter is not None)
            and not base._forward_hooks
            and not base._forward_pre_hooks
        )


def fuse(module: nn.Module) -> None:
    """Give every Linear layer with a LoRA the fused pass, however its weight is stored; special ones keep PEFT's."""
    for layer in module.modules():
        if (
            type(layer) is Linear
            and type(layer.base_layer) in (nn.Linear, QuantizedLinear)
            and not layer.fan_in_fan_out
        ):
            layer.__class__ = FusedLinear  # only the forward pass differs


class _LoraLinear(torch.autograd.Function):
    """``x Wᵀ + b + (x Aᵀ) Bᵀ`` for x ``(..., n)``, W ``(m, n)``, A ``(r, n)``, B ``(m, r)``; W and b are frozen.

    W is asked for once more backwards: where it is stored in fewer bits, no unpacked one is kept in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, A: Tensor, B: Tensor) -> Tensor:
        h = F.linear(x, A)
        y = product(x, base).contiguous()
        _rows(y).addmm_(_rows(h), B.mT)
        ctx.base = base
        ctx.save_for_backward(x, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        for_x, _, for_A, for_B = ctx.needs_input_grad
        gy = _rows(gy)
        gh = gy @ B
        gA = gh.mT @ _rows(x) if for_A else None
        gB = gy.mT @ _rows(h) if for_B else None
        gx = (gy @ dense_weight(ctx.base, gy.dtype)).addmm_(gh, A).view(x.shape) if for_x else None
        return gx, None, gA, gB


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
