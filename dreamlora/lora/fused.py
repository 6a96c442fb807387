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
        dtype = None if args or kwargs else self._plain_precision(x)
        if dtype is None:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base, scale = self._modules["base_layer"], self.scaling[ADAPTER]
        A, B = self._factor("lora_A"), self._factor("lora_B")
        return _product(x.to(dtype), base, A, B, scale)

    def _factor(self, name: str) -> Any:
        # nn.Module's own look-up of a part takes as long as a small operation; there are thousands in a step
        return self._modules[name]._modules[ADAPTER]._parameters["weight"]

    def _plain_precision(self, x: Tensor) -> torch.dtype | None:
        """What the fused pass computes in; None: it cannot."""
        parts: Any = self._modules
        base, weight = parts["base_layer"], parts["base_layer"]._parameters.get("weight")
        if (
            ADAPTER not in parts["lora_A"]._modules
            or self._active_adapter not in _ALONE
            or self._disable_adapters
            or self.merged_adapters
            or self.lora_variant
            or (self.training and isinstance(parts["lora_dropout"]._modules[ADAPTER], nn.Dropout))
            or base._forward_hooks
            or base._forward_pre_hooks
        ):
            return None
        for parameter in base._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return None
        precision: torch.dtype = base.dtype if weight is None else weight.dtype
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # torch knows no autocast of meta tensors
            return precision if precision == torch.get_autocast_dtype(device) else None
        return precision if x.dtype == precision == self._factor("lora_A").dtype else None


_ALONE = (ADAPTER, [ADAPTER])
"""As PEFT holds the names of the adapters that are switched on, when that is ours alone."""


def fuse(module: nn.Module) -> None:
    """Give every Linear layer with a LoRA the fused pass, however its weight is stored; special ones keep PEFT's."""
    for layer in module.modules():
        if (
            type(layer) is Linear
            and type(layer.base_layer) in (nn.Linear, QuantizedLinear)
            and not layer.fan_in_fan_out
        ):
            layer.__class__ = FusedLinear  # only the forward pass differs


def _product(x: Tensor, base: Any, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``x Wᵀ + b + s (x Aᵀ) Bᵀ``; torch.compile gets it in operations that it knows, and joins their passes itself."""
    if torch.compiler.is_compiling():
        return product(x, base) + F.linear(F.linear(x, A.to(x.dtype)), _scaled(B, scale).to(x.dtype))
    fused: Tensor = _LoraLinear.apply(x, base, A, B, scale)
    return fused


class _LoraLinear(torch.autograd.Function):
    """``x Wᵀ + b + s (x Aᵀ) Bᵀ`` for x ``(..., n)``, W ``(m, n)``, A ``(r, n)``, B ``(m, r)``; W and b are frozen.

    A and B may be in a higher precision than x: they are rounded in here, where autograd would keep a record of each
    rounding. W is asked for once more backwards: where it is stored in fewer bits, no unpacked one is kept in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.base, ctx.scale, ctx.precisions = base, scale, (A.dtype, B.dtype)
        A, B = A.to(x.dtype), _scaled(B, scale).to(x.dtype)
        h = F.linear(x, A)
        y = product(x, base).contiguous()
        _rows(y).addmm_(_rows(h), B.mT)
        ctx.save_for_backward(x, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        for_x, _, for_A, for_B, _ = ctx.needs_input_grad
        gy = _rows(gy)
        gh = gy @ B
        gA = (gh.mT @ _rows(x)).to(ctx.precisions[0]) if for_A else None
        gB = _scaled((gy.mT @ _rows(h)).to(ctx.precisions[1]), ctx.scale) if for_B else None
        gx = (gy @ dense_weight(ctx.base, gy.dtype)).addmm_(gh, A).view(x.shape) if for_x else None
        return gx, None, gA, gB, None


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else scale * tensor


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
