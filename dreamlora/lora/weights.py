"""What a file of adapters holds, in one form whatever the file's format: by component and layer.

Names of layers are those that they have in diffusers' and transformers' models, without the "text_model." that some
versions put before those of CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

import torch
from torch import Tensor

Kind = Literal["lora", "loha", "lokr"]

_LOKR_ROWS = (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a"))


@dataclass(frozen=True)
class LayerWeights:
    """The adapter of one layer whose weight is ``(m, n)``, or ``(m, n, h, w)`` of a convolution.

    Attributes:
        kind: of the adapter.
        tensors: its factors, by PEFT's and LyCORIS' names. A LoRA has "lora_A" ``(r, n, ...)`` and "lora_B" ``(m, r)``,
            of a convolution ``(m, r, 1, 1)``.
        alpha: ΔW is scaled by ``alpha / r``. Of no account for a LoKr of two whole matrices, which has no r.
        magnitude: DoRA's, ``(m,)``; None: it is no DoRA.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """r; None of a LoKr of two whole matrices."""
        if self.kind == "lora":
            return len(self.tensors["lora_A"])
        if self.kind == "loha":
            return len(self.tensors["hada_w1_b"])
        inner = next((self.tensors[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in self.tensors), None)
        return None if inner is None else len(inner)

    @property
    def scale(self) -> float:
        """``alpha / r``; 1 without an r."""
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def rows(self) -> int:
        """m."""
        if self.kind == "lokr":
            parts = [next(self.tensors[name] for name in names if name in self.tensors) for names in _LOKR_ROWS]
            return len(parts[0]) * (parts[1].shape[1] if "lokr_t2" in self.tensors else len(parts[1]))
        if "hada_t1" in self.tensors:
            return self.tensors["hada_w1_a"].shape[1]
        return len(self.tensors["lora_B" if self.kind == "lora" else "hada_w1_a"])

    @property
    def down(self) -> Tensor:
        """A LoRA's A."""
        return self.tensors["lora_A"]

    @property
    def up(self) -> Tensor:
        """A LoRA's B."""
        return self.tensors["lora_B"]

    def delta(self) -> Tensor:
        """ΔW, in float32 (float64 of factors in float64): what is added to the layer's weight; of a DoRA what is added
        before the rows get their magnitude. ``(m, n, ...)``; of a LoHa or LoKr of a convolution without a core it may
        be ``(m, n * h * w)``.
        """
        precise = {
            name: tensor if tensor.dtype == torch.float64 else tensor.float() for name, tensor in self.tensors.items()
        }
        product = {"lora": _lora, "loha": hadamard_product, "lokr": _lokr}[self.kind](precise)
        return product * self.scale

    def with_alpha(self, alpha: float) -> Self:
        """The same ΔW of a LoRA with another alpha; B is multiplied by what the scale loses."""
        if alpha == self.alpha:
            return self
        up = self.up * (self.alpha / alpha)
        return replace(self, tensors={**self.tensors, "lora_B": up}, alpha=alpha)

    def with_sides(self, count: int) -> Self:
        """The same LoRA for a linear layer (2) where it is for a 1 x 1 convolution (4), and the other way round: some
        models have the same layer as either.
        """
        if self.kind != "lora" or {self.down.ndim, count} != {2, 4} or self.down[0, 0].numel() > 1:
            return self
        kernel = (1,) * (count - 2)
        tensors = {name: tensor.reshape(*tensor.shape[:2], *kernel) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def in_precision(self, dtype: torch.dtype) -> Self:
        """All in another precision."""
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, magnitude=magnitude)


AdapterWeights: TypeAlias = dict[str, dict[str, LayerWeights]]
"""By component ("unet", "text_encoder_2") and layer."""


def lora_weights(down: Tensor, up: Tensor, alpha: float | None = None, magnitude: Tensor | None = None) -> LayerWeights:
    """Those of a LoRA; without an alpha the scale is 1."""
    return LayerWeights("lora", {"lora_A": down, "lora_B": up}, float(len(down)) if alpha is None else alpha, magnitude)


def _lora(factors: Mapping[str, Tensor]) -> Tensor:
    return product_of(factors["lora_B"], factors["lora_A"])


def product_of(up: Tensor, down: Tensor) -> Tensor:
    """``B A`` in the shape of the weight: ``(m, n, ...)`` of ``(m, r, ...)`` and ``(r, n, ...)``.

    The spatial part may be in either factor, as with ``(m, r, 3, 3)`` and ``(r, n, 1, 1)``: one of them is 1 x 1.
    """
    if down.ndim == 2:
        return up @ down
    if up[0, 0].numel() == 1:
        return torch.einsum("mr,rnhw->mnhw", up.flatten(1), down)
    return torch.einsum("mrhw,rn->mnhw", up, down.flatten(1))


def hadamard_product(factors: Mapping[str, Tensor]) -> Tensor:
    """``(W1a W1b) ⊙ (W2a W2b)``, of a Tucker decomposition with cores ``(r, r, h, w)``."""
    one, other = (_product(factors, f"hada_w{number}", f"hada_t{number}") for number in (1, 2))
    return one * other


def _lokr(factors: Mapping[str, Tensor]) -> Tensor:
    """``W1 ⊗ W2``, each of which may be a product; of a convolution W2 has the spatial part."""
    w1, w2 = kronecker_halves(factors)
    if w2.ndim > 2:
        w1 = w1[..., None, None]
    return torch.kron(w1, w2.contiguous())


def kronecker_halves(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W1 and W2 of a LoKr's factors."""
    one, other = (
        factors[name] if name in factors else _product(factors, name, f"lokr_t{name[-1]}")
        for name in ("lokr_w1", "lokr_w2")
    )
    return one, other


def _product(factors: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """``a b``; with a core ``(r, s, h, w)`` of ``(r, m)`` and ``(s, n)``: ``(m, n, h, w)``."""
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", factors[core], a, b) if core in factors else a @ b
