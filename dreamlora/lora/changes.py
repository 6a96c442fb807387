"""What adapters of other kinds than LoRA change: how large it is, layer by layer.

- A DoRA's change is ``(c − 1) ∘ W₀ + s (c ∘ B) A``; row i has the factor ``cᵢ = mᵢ / ‖(W₀ + s B A)ᵢ‖``: lengths of
  W₀'s rows and ``W₀ Aᵀ`` are all that is needed of W₀.
- A LoKr's ``W₁ ⊗ W₂`` has the entries of the product of rank 1 ``vec(W₁) vec(W₂)ᵀ`` in another order, and so its norm.
- A LoHa's ``(B₁A₁) ∘ (B₂A₂)`` has no short form: it is made on the device, as in each forward pass, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dreamlora.lora.pairs import AdaptedLayer, TunedLayer
from dreamlora.lora.weights import hadamard_product, kronecker_halves
from dreamlora.precision import dense_weight, weight_shape


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

    def square_from(self, before: Directed | None) -> float:
        """``‖ΔW₁ − ΔW₀‖_F²``; without ``before`` from the base weights."""
        s, c1, A1 = self.scaling, self.factor(), self.A.double()
        up1 = c1 * self.B.double()
        c0, A0, up0 = torch.ones_like(c1), A1, torch.zeros_like(up1)
        crossed = (self.rows.projected.double() * up1).sum(1)
        if before is not None:
            c0, A0 = before.factor(), before.A.double()
            up0 = c0 * before.B.double()
            crossed = crossed - (before.rows.projected.double() * up0).sum(1)
        step = (c1 - c0)[:, 0]
        product = _square_of_product(torch.cat([up1, up1 - up0], 1), torch.cat([A1 - A0, A0]))
        of_rows = (step**2 * self.rows.lengths.double() ** 2 + 2 * s * step * crossed).sum()
        return max(0.0, float(of_rows + s**2 * product))


@dataclass(frozen=True)
class Product:
    """A LoHa's or LoKr's layer.

    Attributes:
        name, scaling: see ``TunedLayer``.
        tensors: its parameters by PEFT's names.
        device: where dense matrices are made.
        entries: of the layer's weight.
    """

    name: str
    scaling: float
    tensors: Mapping[str, Tensor]
    device: torch.device
    entries: int

    def square_from(self, before: Product | None) -> float:
        """See ``Directed``."""
        if "hada_w1_a" in self.tensors:
            delta = self._dense() if before is None else self._dense() - before._dense()
            return self.scaling**2 * float(delta.norm()) ** 2
        up, down = self._vectors()
        if before is not None:
            up0, down0 = before._vectors()
            up, down = torch.cat([up, up - up0], 1), torch.cat([down - down0, down0])
        return self.scaling**2 * float(_square_of_product(up, down))

    def _dense(self) -> Tensor:
        """ΔW without its scaling, on the device."""
        return hadamard_product({name: tensor.to(self.device) for name, tensor in self.tensors.items()})

    def _vectors(self) -> tuple[Tensor, Tensor]:
        """``vec(W₁)`` as a column, ``vec(W₂)`` as a row, in float64."""
        one, other = kronecker_halves({name: tensor.double() for name, tensor in self.tensors.items()})
        return one.reshape(-1, 1), other.reshape(1, -1)


Change = AdaptedLayer | Product
"""Of one layer: of a LoRA, of a DoRA (``Directed``), or of another kind."""


def change_of(layer: TunedLayer) -> Change:
    """The change of a layer, whose tensors are its own."""
    pair, base = layer.pair, layer.layer.base_layer
    if pair is None:
        tensors = {name: parameter.detach() for name, parameter in layer.parameters.items()}
        device, entries = next(iter(tensors.values())).device, math.prod(weight_shape(base))
        return Product(layer.name, layer.scaling, tensors, device, entries)
    if pair.magnitude is None:
        return pair
    weight = dense_weight(base, device=pair.A.device).detach()
    projected = weight.flatten(1).float() @ pair.A.detach().flatten(1).mT
    rows = BaseRows(pair.magnitude.detach().flatten(), pair.base_lengths().flatten(), projected)
    return Directed(**vars(pair), rows=rows)


def _square_of_product(up: Tensor, down: Tensor) -> Tensor:
    """``‖U D‖_F²`` ``()`` of U ``(m, k)`` and D ``(k, n)``."""
    return ((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0)
