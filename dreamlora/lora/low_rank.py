"""Singular values of adapters, and LoRAs of a lower rank: the best ones there are in the Frobenius norm.

``ΔW = U diag(S) Vᵀ`` is had from the factors, at a cost of ``(m + n) k²`` where k is their rank: the matrix itself
``(m, n)`` is never made, but of a Tucker decomposition's. All is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dreamlora.lora.weights import LayerWeights, lora_weights

_OVERSAMPLED = 16
"""Directions that a randomised decomposition looks for beyond those that are kept."""
_POWER_ITERATIONS = 4
_FIRST_GUESS = 64
"""The rank that is tried first where the energy decides."""
_EXACT_UP_TO = 512
"""Rows or columns of a matrix that is decomposed as a whole: 0.1 s; 3,072 take a minute."""
_ROUNDING = 1e-12
"""Of the largest singular value: what is smaller comes of rounding in float64."""


class Spectrum(NamedTuple):
    """The singular value decomposition of a ΔW, of a convolution as ``(m, n * h * w)``.

    Attributes:
        U: ``(m, k)``.
        S: ``(k,)``, falling; the scale is in them.
        V: ``(k, n)``; rows are orthonormal.
        energy: ``‖ΔW‖²``, which may be more than S has where a decomposition was cut.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    energy: float


@dataclass(frozen=True)
class Cut:
    """How much of a ΔW is kept: each that is given is a bound, and the lowest rank that one of them gives counts.

    Attributes:
        rank: the most.
        energy: the share of ``‖ΔW‖²`` that is kept at least.
        ratio: singular values are kept down to this part of the largest one: ``S > S[0] / ratio``.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None

    def rank_of(self, spectrum: Spectrum) -> int:
        """At least 1, at most the number of singular values."""
        S, ranks = spectrum.S, [len(spectrum.S)]
        if self.rank is not None:
            ranks.append(self.rank)
        if self.energy is not None:
            lacking = spectrum.energy * (1 - self.energy + _ROUNDING)
            ranks.append(int((spectrum.energy - S.square().cumsum(0) > lacking).sum()) + 1)
        if self.ratio is not None:
            ranks.append(int((S[0] / self.ratio < S).sum()))
        return max(1, min(ranks))


class Kept(NamedTuple):
    """A LoRA of a lower rank, and what it lacks.

    Attributes:
        weights: the LoRA.
        energy: share of ``‖ΔW‖²`` that it keeps; 1 of a ΔW of zeros.
        error: ``‖ΔW − ΔW'‖ / ‖ΔW‖``.
    """

    weights: LayerWeights
    energy: float
    error: float


def spectrum_of(adapter: LayerWeights) -> Spectrum:
    """Of an adapter; a DoRA's is that of its ΔW, before rows get their magnitude."""
    precise = adapter.in_precision(torch.float64)
    tensors = precise.tensors
    if adapter.kind == "lora" and _is_plain(tensors["lora_B"]):
        return _of_factors(tensors["lora_B"].flatten(1) * adapter.scale, tensors["lora_A"].flatten(1))
    if adapter.kind == "loha" and "hada_t1" not in tensors:
        rows = _products(tensors["hada_w1_a"].mT, tensors["hada_w2_a"].mT).mT
        columns = _products(tensors["hada_w1_b"], tensors["hada_w2_b"])
        return _of_factors(rows * adapter.scale, columns)
    if adapter.kind == "lokr" and "lokr_t2" not in tensors:
        return _of_kronecker(tensors, adapter.scale)
    return _exact(precise.delta().flatten(1))


def _is_plain(up: Tensor) -> bool:
    """Whether a factor has no spatial part."""
    return up[0, 0].numel() == 1


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Every row of one times every row of the other: ``(r, n), (s, n) -> (r * s, n)``.

    ``(W1a W1b) ⊙ (W2a W2b)`` is the product of such factors.
    """
    return (one[:, None] * other[None]).flatten(0, 1)


def _of_factors(up: Tensor, down: Tensor) -> Spectrum:
    """Of ``up @ down``, through a QR decomposition of each."""
    rows, left = torch.linalg.qr(up)
    columns, right = torch.linalg.qr(down.mT)
    U, S, V = torch.linalg.svd(left @ right.mT, full_matrices=False)
    return Spectrum(rows @ U, S, V @ columns.mT, float(S.square().sum()))


def _of_kronecker(tensors: Mapping[str, Tensor], scale: float) -> Spectrum:
    """Of ``W1 ⊗ W2``: all products of their singular values."""
    one, other = (_half(tensors, name) for name in ("lokr_w1", "lokr_w2"))
    S = torch.outer(one.S, other.S).flatten() * abs(scale)
    order = S.argsort(descending=True)
    order = order[: max(1, int((S.max() * _ROUNDING < S).sum()))]
    U, V = torch.kron(one.U, other.U)[:, order], torch.kron(one.V, other.V)[order]
    return Spectrum(U * math.copysign(1, scale), S[order], V, float(S[order].square().sum()))


def _half(tensors: Mapping[str, Tensor], name: str) -> Spectrum:
    if name in tensors:
        return _exact(tensors[name].flatten(1))
    return _of_factors(tensors[f"{name}_a"].flatten(1), tensors[f"{name}_b"].flatten(1))


def _exact(matrix: Tensor) -> Spectrum:
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(U, S, V, float(S.square().sum()))


def resized(adapter: LayerWeights, cut: Cut, spectrum: Spectrum) -> Kept:
    """The adapter as a LoRA of a lower rank, with the scale and in the precision that it has.

    A LoRA that would not get a lower rank stays as it is, to the last bit. A DoRA's magnitudes stay, and what is
    counted is ΔW.

    Args:
        adapter: of any kind.
        cut: how much is kept.
        spectrum: of the adapter.
    """
    shape = shape_of(adapter)
    if adapter.kind == "lora" and cut.rank_of(spectrum) >= len(adapter.down):
        return Kept(adapter, 1.0, 0.0)
    small = kept(spectrum, cut, shape, adapter.scale if adapter.scale > 0 else 1.0)
    dtype = next(iter(adapter.tensors.values())).dtype
    return small._replace(weights=replace(small.weights.in_precision(dtype), magnitude=adapter.magnitude))


def shape_of(adapter: LayerWeights) -> tuple[int, ...]:
    """Of the weight that an adapter is for; of a LoHa or LoKr of a convolution whose factors do not have its kernel
    it looks like a linear layer's.
    """
    if adapter.kind == "lora":
        up, down = adapter.up, adapter.down
        return (len(up), *down.shape[1:2], *(max(sides) for sides in zip(up.shape[2:], down.shape[2:], strict=True)))
    return tuple(adapter.delta().shape)


def spectrum_of_matrix(matrix: Tensor, cut: Cut) -> Spectrum:
    """Of a matrix ``(m, n)`` in float64, with as many singular values as a cut needs.

    Of a large one only the largest are looked for, by a randomised method (Halko, Martinsson and Tropp 2011, algorithm
    4.4, with a fixed seed). What they lack of the matrix is known all the same, as ``energy`` is the matrix' own: the
    error of ``kept`` is that of the LoRA and no estimate. Where they do not reach the cut's energy, more are looked
    for.
    """
    energy, most = float(matrix.square().sum()), min(matrix.shape)
    wanted = min(cut.rank or _FIRST_GUESS, most)
    while most > _EXACT_UP_TO and 4 * (wanted + _OVERSAMPLED) < most:
        found = _largest(matrix, wanted + _OVERSAMPLED)._replace(energy=energy)
        reached = float(found.S[:wanted].square().sum()) >= (cut.energy or 0) * energy
        past_ratio = cut.ratio is None or bool(found.S[wanted - 1] <= found.S[0] / cut.ratio)
        if wanted == cut.rank or (reached and past_ratio):
            return found
        wanted = min(2 * wanted, cut.rank or most)
    return _exact(matrix)


def _largest(matrix: Tensor, count: int) -> Spectrum:
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], count, generator=draw, dtype=matrix.dtype)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    U, S, V = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return Spectrum(basis @ U, S, V, float(S.square().sum()))


def kept(spectrum: Spectrum, cut: Cut, shape: tuple[int, ...], scale: float = 1.0) -> Kept:
    """The LoRA of what is kept, in float64: both factors are of one size, as those of a trained one about are.

    Args:
        spectrum: of ΔW.
        cut: how much is kept.
        shape: of the layer's weight: ``(m, n)`` or ``(m, n, h, w)``.
        scale: ``alpha / r`` that the LoRA has.
    """
    rank = cut.rank_of(spectrum)
    root = (spectrum.S[:rank] / scale).sqrt()
    up, down = spectrum.U[:, :rank] * root, root[:, None] * spectrum.V[:rank]
    weights = lora_weights(
        down.reshape(rank, *shape[1:]).contiguous(),
        up.reshape(-1, rank, *(1 for _ in shape[2:])).contiguous(),
        alpha=scale * rank,
    )
    lost = max(0.0, spectrum.energy - float(spectrum.S[:rank].square().sum()))
    if rank == len(spectrum.S) and lost <= spectrum.energy * _ROUNDING:
        lost = 0.0
    share = lost / spectrum.energy if spectrum.energy else 0.0
    return Kept(weights, 1 - share, math.sqrt(share))
