"""Adapters added to weights, and to each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from dreamlora.lora.low_rank import Cut, kept, shape_of, spectrum_of
from dreamlora.lora.weights import LayerWeights, lora_weights

Weighted = tuple[LayerWeights, float]
"""An adapter, and what its effect is multiplied by, which may be negative."""


def added(weight: Tensor, adapters: Sequence[Weighted]) -> Tensor:
    """A layer's weight with adapters in it, as the layer computes that has all of them: each changes what the weight
    was without the others. A DoRA's rows have its magnitudes, whatever its ΔW is multiplied by, as PEFT has it.

    Args:
        weight: ``(m, n)``, or ``(m, n, h, w)`` of a convolution.
        adapters: of this layer.

    Returns:
        In float32; in float64 where the weight is.
    """
    base = weight if weight.dtype == torch.float64 else weight.float()
    total = base
    for adapter, strength in adapters:
        delta = strength * adapter.delta().to(base.dtype).reshape(base.shape)
        total = total + (delta if adapter.magnitude is None else _with_magnitude(base, delta, adapter.magnitude) - base)
    return total


def _with_magnitude(base: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """``m (W + ΔW) / ‖W + ΔW‖``, row by row."""
    moved = base + delta
    norms = moved.flatten(1).norm(dim=1).clamp_min(torch.finfo(base.dtype).tiny)  # a row of zeros stays one
    return moved * (magnitude.to(base.dtype) / norms).reshape(-1, *(1 for _ in base.shape[1:]))


def fits(adapter: LayerWeights, shape: tuple[int, ...]) -> bool:
    """Whether an adapter is for a weight of this shape; factors of a convolution may lack its kernel: those of a LoRA
    where it is 1 x 1.
    """
    own, columns = shape_of(adapter.with_sides(len(shape))), torch.Size(shape[1:]).numel()
    return own == shape or (adapter.kind != "lora" and own == (shape[0], columns))


def concatenated(adapters: Sequence[Weighted]) -> LayerWeights:
    """One LoRA whose ΔW is the sum of theirs, exactly: its rank is the sum of their ranks.

    What a LoRA is multiplied by goes into its B; LoHas and LoKrs become LoRAs of all the ranks that they have.

    Args:
        adapters: of one layer.

    Raises:
        ValueError: they are for weights of other shapes, or one is a DoRA, whose effect no ΔW has without the weight.
    """
    loras = [(_as_lora(adapter), strength) for adapter, strength in adapters]
    shapes = {shape_of(lora) for lora, _ in loras}
    if len(shapes) > 1:
        raise ValueError(f"they are for weights of other shapes: {' and '.join(map(str, sorted(shapes)))}")
    if len(loras) == 1 and loras[0][1] == 1:
        return loras[0][0]
    scale = loras[0][0].scale if loras[0][0].scale > 0 else 1.0
    dtype = reduce(torch.promote_types, (lora.up.dtype for lora, _ in loras))
    down = torch.cat([lora.down.to(dtype) for lora, _ in loras])
    up = torch.cat([lora.up.to(dtype) * (strength * lora.scale / scale) for lora, strength in loras], dim=1)
    return lora_weights(down, up, alpha=scale * len(down))


def _as_lora(adapter: LayerWeights) -> LayerWeights:
    if adapter.magnitude is not None:
        raise ValueError("it is a DoRA, which is more than a sum: merge it into its base model, and extract a LoRA")
    if adapter.kind == "lora" and adapter.up[0, 0].numel() == 1:
        return adapter
    whole = kept(spectrum_of(adapter), Cut(), shape_of(adapter)).weights
    dtype = next(iter(adapter.tensors.values())).dtype
    return whole.in_precision(dtype)
