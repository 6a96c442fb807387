"""What adapters of other kinds than LoRA change, in forms whose size is known without an m×n matrix.

- A DoRA's change is ``(c − 1) ∘ W₀ + s (c ∘ B) A``; row i has the factor ``cᵢ = mᵢ / ‖(W₀ + s B A)ᵢ‖``: lengths of
  W₀'s rows and ``W₀ Aᵀ`` are all that is needed of W₀.
- A LoHa's is a product of rank r²: ``(B₁A₁) ∘ (B₂A₂) = (B₁ ⊙ B₂)(A₁ ⊙ A₂)``, with all products of columns, and of rows.
- A LoKr's ``W₁ ⊗ W₂`` has the entries of the product of rank 1 ``vec(W₁) vec(W₂)ᵀ`` in another order, and so its norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dreamlora.lora.pairs import AdaptedLayer, TunedLayer


@dataclass(frozen=True)
class Product(AdaptedLayer):
    """A LoHa's or LoKr's change as ``scaling · B A``, but for the order of a LoKr's entries.

    Attributes:
        rearranged: whether it is in another order, so that singular values are others.
    """

    rearranged: bool


class BaseRows(NamedTuple):
    """What is needed of the rows of W₀ ``(m, n)``, convolutions flattened.

    Attributes:
        magnitude: ``(m,)`` of the DoRA.
        lengths: ``(m,)``, ``‖W₀ᵢ‖``.
        projected: ``(m, r)``, ``W₀ Aᵀ``.
    """

    magnitude: Tensor
    lengths: Tensor
    projected: Tensor


@dataclass(frozen=True)
class Directed(AdaptedLayer):
    """A DoRA's layer with what is needed of the rows of W₀."""

    rows: BaseRows

    def factor(self) -> Tensor:
        """c ``(m, 1)`` in float64: what the rows of ``W₀ + s B A`` are multiplied by."""
        A, B, (magnitude, lengths, projected) = self.A.double(), self.B.double(), (x.double() for x in self.rows)
        crossed = 2 * self.scaling * (projected * B).sum(1) + self.scaling**2 * ((B @ (A @ A.mT)) * B).sum(1)
        return (magnitude / (lengths**2 + crossed).clamp_min(1e-300).sqrt())[:, None]


def change_of(layer: TunedLayer) -> AdaptedLayer:
    """The change of a layer, whose tensors may still be its own."""
    pair, parameters = layer.pair, layer.parameters
    if pair is None:
        loha = "hada_w1_a" in parameters
        up, down = _loha_factors(parameters) if loha else _lokr_vectors(parameters)
        return Product(layer.name, down, up, layer.scaling, None, layer.layer, rearranged=not loha)
    if pair.magnitude is None:
        return pair
    weight, A = layer.layer.base_layer.weight.detach().flatten(1).float(), pair.A.detach().flatten(1)
    rows = BaseRows(pair.magnitude.detach().flatten(), pair.base_lengths().flatten(), weight @ A.mT)
    return Directed(**vars(pair), rows=rows)


def directed_square(before: Directed | None, after: Directed) -> float:
    """``‖ΔW₁ − ΔW₀‖_F²``; from the base weights, where ``before`` is None."""
    s, c1, A1 = after.scaling, after.factor(), after.A.double()
    up1 = c1 * after.B.double()
    c0, A0, up0 = torch.ones_like(c1), A1, torch.zeros_like(up1)
    crossed = (after.rows.projected.double() * up1).sum(1)
    if before is not None:
        c0, A0 = before.factor(), before.A.double()
        up0 = c0 * before.B.double()
        crossed = crossed - (before.rows.projected.double() * up0).sum(1)
    step = (c1 - c0)[:, 0]
    up, down = torch.cat([up1, up1 - up0], 1), torch.cat([A1 - A0, A0])
    product = ((up.mT @ up) * (down @ down.mT)).sum()
    return max(0.0, float((step**2 * after.rows.lengths.double() ** 2 + 2 * s * step * crossed).sum() + s**2 * product))


@torch.no_grad()
def _loha_factors(p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``(m, r²)`` and ``(r², n)``."""
    ups, downs = [], []
    for i in "12":
        up, down = p[f"hada_w{i}_a"], p[f"hada_w{i}_b"]
        if f"hada_t{i}" in p:  # a kernel: sides (r, r, ...) between the two
            up, down = up.mT, torch.einsum("ij...,jr->ir...", p[f"hada_t{i}"], down).flatten(1)
        ups.append(up)
        downs.append(down)
    up = (ups[0][:, :, None] * ups[1][:, None, :]).flatten(1)
    return up, (downs[0][:, None, :] * downs[1][None, :, :]).flatten(0, 1)


@torch.no_grad()
def _lokr_vectors(p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``(a·b, 1)`` and ``(1, c·d)``."""
    factors = []
    for i in "12":
        if f"lokr_w{i}" in p:
            factor = p[f"lokr_w{i}"]
        elif f"lokr_t{i}" in p:
            factor = torch.einsum("ij...,jr,ip->pr...", p[f"lokr_t{i}"], p[f"lokr_w{i}_b"], p[f"lokr_w{i}_a"])
        else:
            factor = p[f"lokr_w{i}_a"] @ p[f"lokr_w{i}_b"]
        factors.append(factor)
    return factors[0].reshape(-1, 1), factors[1].reshape(1, -1)
