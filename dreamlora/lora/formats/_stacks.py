"""Adapters of layers that are one layer in other programs: their rows lie one below the other, as in a fused q, k, v.

``[B_q A_q; B_k A_k] = diag(B_q, B_k) [A_q; A_k]``: what was several becomes one of the sum of their ranks, exactly; and
what was one becomes several that share its A, each with its rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dreamlora.lora.weights import LayerWeights

_FACTORS = {"lora": (("lora_A", "lora_B"),), "loha": (("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a"))}
"""Of each kind the factors: of columns, and of rows."""


def stacked(parts: Sequence[LayerWeights | None], rows: Sequence[int]) -> LayerWeights:
    """One adapter of all.

    Args:
        parts: from top to bottom; None: there is none.
        rows: of each.

    Raises:
        ValueError: they cannot be one.
    """
    present = [part for part in parts if part is not None]
    first = present[0]
    if len(parts) == 1:
        return first
    kinds = {part.kind for part in present}
    if len(kinds) > 1 or first.kind not in _FACTORS or "hada_t1" in first.tensors:
        raise ValueError(f"a {first.kind} of several layers that are one there cannot be joined")
    magnitudes = [part.magnitude for part in parts if part is not None and part.magnitude is not None]
    if magnitudes and len(magnitudes) < len(parts):
        raise ValueError("a DoRA of some of the layers that are one there needs one of all of them")
    shared = all(_shares(part, first) for part in present)
    scale = first.scale if all(part.scale == first.scale for part in present) else None
    tensors: dict[str, Tensor] = {}
    for number, (columns, of_rows) in enumerate(_FACTORS[first.kind]):
        ups = [
            None if part is None else part.tensors[of_rows] * (1.0 if scale is not None or number else part.scale)
            for part in parts
        ]
        downs = [part.tensors[columns] for part in present]
        tensors[columns] = downs[0] if shared else torch.cat(downs)
        tensors[of_rows] = _blocks(ups, rows, diagonal=not shared)
    rank = len(tensors[_FACTORS[first.kind][0][0]])
    alpha = rank * (1.0 if scale is None else scale)
    return LayerWeights(first.kind, tensors, alpha, torch.cat(magnitudes) if magnitudes else None)


def parted(whole: LayerWeights, rows: Sequence[int]) -> list[LayerWeights | None]:
    """Adapters of the layers that one was made of; None where it does nothing.

    Args:
        whole: of all.
        rows: of each.

    Raises:
        ValueError: it is of convolutions, which are never one.
    """
    if len(rows) == 1:
        return [whole]
    if "hada_t1" in whole.tensors:
        raise ValueError("a LoHa with cores is a convolution's, and has no parts")
    magnitudes = [None] * len(rows) if whole.magnitude is None else whole.magnitude.split(list(rows))
    if whole.kind == "lokr":
        parts = whole.delta().flatten(1).split(list(rows))
        return [_as_lokr(part, magnitude) for part, magnitude in zip(parts, magnitudes, strict=True)]
    pieces = {of_rows: whole.tensors[of_rows].split(list(rows)) for _, of_rows in _FACTORS[whole.kind]}
    return [
        _part(whole, {name: tensors[number] for name, tensors in pieces.items()}, magnitudes[number])
        for number in range(len(rows))
    ]


def swapped(weights: LayerWeights) -> LayerWeights:
    """With both halves of the rows in each other's place.

    Raises:
        ValueError: it is a LoKr, whose rows cannot be exchanged so.
    """
    if weights.kind not in _FACTORS:
        raise ValueError(f"the rows of a {weights.kind} cannot change places")
    names = {of_rows for _, of_rows in _FACTORS[weights.kind]}
    tensors = {name: _exchanged(tensor) if name in names else tensor for name, tensor in weights.tensors.items()}
    magnitude = None if weights.magnitude is None else _exchanged(weights.magnitude)
    return LayerWeights(weights.kind, tensors, weights.alpha, magnitude)


def _exchanged(tensor: Tensor) -> Tensor:
    upper, lower = tensor.chunk(2)
    return torch.cat([lower, upper])


def _shares(one: LayerWeights, other: LayerWeights) -> bool:
    """Whether two have the same factors of columns: as parts of one that was stored as one."""
    columns = [name for name, _ in _FACTORS[one.kind]]
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in columns)


def _blocks(ups: Sequence[Tensor | None], rows: Sequence[int], *, diagonal: bool) -> Tensor:
    """Factors of rows, one below the other: ``(sum of m, r, ...)``, or on a diagonal: ``(sum of m, sum of r, ...)``."""
    present = [up for up in ups if up is not None]
    ranks = [up.shape[1] for up in present]
    result = present[0].new_zeros(sum(rows), sum(ranks) if diagonal else ranks[0], *present[0].shape[2:])
    top = left = 0
    for up, height in zip(ups, rows, strict=True):
        if up is not None:
            result[top : top + height, left : left + up.shape[1]] = up
            left += up.shape[1] if diagonal else 0
        top += height
    return result


def _part(whole: LayerWeights, ups: Mapping[str, Tensor], magnitude: Tensor | None) -> LayerWeights | None:
    """A part, of the ranks that do something in it, so that what was stacked comes out as it was."""
    each = [up.transpose(0, 1).flatten(1).ne(0).any(dim=1) for up in ups.values()]
    if magnitude is None and not all(used.any() for used in each):
        return None
    used = torch.stack(each).any(dim=0)
    if used.all() or not used.any():
        return LayerWeights(whole.kind, {**whole.tensors, **ups}, whole.alpha, magnitude)
    tensors: dict[str, Tensor] = {}
    for columns, of_rows in _FACTORS[whole.kind]:
        tensors |= {columns: whole.tensors[columns][used], of_rows: ups[of_rows][:, used]}
    return LayerWeights(whole.kind, tensors, whole.scale * int(used.sum()), magnitude)


def _as_lokr(delta: Tensor, magnitude: Tensor | None) -> LayerWeights:
    """Any ΔW as a LoKr of a single 1 and itself: rows of a Kronecker product are none in general."""
    return LayerWeights("lokr", {"lokr_w1": delta.new_ones(1, 1), "lokr_w2": delta.contiguous()}, 1.0, magnitude)
