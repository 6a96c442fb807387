"""Factors of adapters by the ends of their names, which most formats share; what belongs to one layer becomes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from dreamlora.lora.part_names import END, ENDS, LOHA
from dreamlora.lora.weights import Kind, LayerWeights, lora_weights


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What belongs to each layer: by its name, as the file has it, factors by PEFT's and LyCORIS' names.

    Raises:
        ValueError: a tensor is none of these, or there are two of one.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = END.fullmatch(key)
        if found is None:
            raise ValueError(f"{key} is no part of a LoRA, DoRA, LoHa or LoKr")
        factors = layers.setdefault(found["layer"], {})
        name = ENDS[found["end"]]
        if name in factors:
            raise ValueError(f"{found['layer']} has two of {name}")
        of_rows = found["end"].startswith("lora_magnitude_vector")  # PEFT's, whatever its shape
        factors[name] = tensor.reshape(-1, 1) if of_rows else tensor
    return layers


def is_part(name: str) -> bool:
    """Whether a name is that of a part of a LoRA, DoRA, LoHa or LoKr."""
    return END.fullmatch(name) is not None


def weights_of(layer: str, factors: Mapping[str, Tensor]) -> LayerWeights:
    """The adapter that these are; without an alpha its scale is 1.

    Args:
        layer: for messages.
        factors: of ``by_layer``.

    Raises:
        ValueError: something is missing, or does not belong together.
    """
    rest = dict(factors)
    alpha, magnitude = rest.pop("alpha", None), rest.pop("magnitude", None)
    kind = _kind(layer, rest)
    flat = next((name for name, tensor in rest.items() if tensor.ndim < 2), None)
    if flat:
        raise ValueError(f"{layer}: {flat} is {tuple(rest[flat].shape)}, and no matrix")
    if kind == "lora":
        down, up = rest["lora_A"], rest["lora_B"]
        if up.shape[1] != len(down):
            raise ValueError(f"{layer}: factors of {tuple(down.shape)} and {tuple(up.shape)} are no pair of one rank")
        if "lora_mid" in rest:
            down = _with_core(layer, rest["lora_mid"], down)
        if up.ndim == 2 < down.ndim:  # LyCORIS' DyLoRA of a convolution
            up = up.reshape(*up.shape, *(1 for _ in down.shape[2:]))
        weights = lora_weights(down, up)
    else:
        weights = _whole(layer, LayerWeights(kind, rest, 1.0))
        if weights.rank:
            weights = LayerWeights(kind, rest, float(weights.rank))
    if alpha is not None:
        weights = LayerWeights(kind, weights.tensors, float(alpha))
    if magnitude is None:
        return weights
    return LayerWeights(kind, weights.tensors, weights.alpha, _magnitude(layer, magnitude, weights))


_NEEDED: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "lora": (("lora_A", "lora_B"),),
    "loha": (LOHA[:4], LOHA),
    "lokr": tuple(
        (*first, *second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
    ),
}
"""Factors that make up an adapter, besides those that any may have."""


def _kind(layer: str, factors: Mapping[str, Tensor]) -> Kind:
    names = factors.keys() - {"lora_mid"}
    for kind in get_args(Kind):
        if any(names == set(needed) for needed in _NEEDED[kind]):
            return kind
    raise ValueError(f"{layer} has {', '.join(sorted(factors)) or 'an alpha alone'}, which is no whole adapter")


def _whole(layer: str, weights: LayerWeights) -> LayerWeights:
    """The same of a LoHa or LoKr, whose factors go together: tried without their values."""
    tensors = {name: tensor.to("meta") for name, tensor in weights.tensors.items()}
    try:
        replace(weights, tensors=tensors).delta()
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{layer}: its factors do not go together: {shapes}") from None
    return weights


def _with_core(layer: str, core: Tensor, down: Tensor) -> Tensor:
    """LoCon's Tucker decomposition ``B M A`` as ``B (M A)``, with M ``(r, r, h, w)`` and A ``(r, n, 1, 1)``."""
    if core.ndim != 4 or core.shape[:2] != (len(down), len(down)) or down[0, 0].numel() != 1:
        raise ValueError(f"{layer}: a core of {tuple(core.shape)} does not go with a factor of {tuple(down.shape)}")
    product = torch.einsum("rshw,sn->rnhw", core.float(), down.float().flatten(1))
    return product.to(down.dtype).contiguous()  # PEFT's DoRA takes no other


def _magnitude(layer: str, magnitude: Tensor, weights: LayerWeights) -> Tensor:
    """``(m,)`` of ``(m, 1)`` or ``(m, 1, 1, 1)``.

    Old LyCORIS files and OneTrainer's have one for every column instead: ``(1, n)``, of a convolution ``(1, n, 1, 1)``.
    """
    of_columns = magnitude.ndim > 1 and len(magnitude) == 1 and magnitude.numel() > 1
    if of_columns or weights.rows != magnitude.numel():
        raise ValueError(
            f"{layer} has magnitudes of {tuple(magnitude.shape)}: only DoRAs with one for every output are known"
        )
    return magnitude.flatten()


def named(weights: LayerWeights, ends: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Ends of names, and tensors; magnitudes as other programs have them: ``(m, 1)``, or ``(m, 1, 1, 1)``.

    Args:
        weights: of a layer.
        ends: that differ from PEFT's and LyCORIS' names.
    """
    for name, tensor in weights.tensors.items():
        yield ends.get(name, name), tensor
    if weights.magnitude is not None:
        sides = weights.down.ndim if weights.kind == "lora" else 2
        yield "dora_scale", weights.magnitude.reshape(-1, *(1 for _ in range(sides - 1)))
