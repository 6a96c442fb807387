"""How large the ΔW of an adapter is, from its factors: no ``(m, n)`` matrix is made of a LoRA or a LoKr.

The largest singular value of a LoRA's ``B A`` is that of a small matrix, ``R_B R_Aᵀ`` of QR decompositions of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dreamlora.commands.inspect.tensors import Array

_WORK = 2**40
"""Multiplications for the norms of a file: a minute at most. A LoRA of all layers of SDXL of rank 64 takes a twentieth
of them, a LoHa a third."""
_QR = 4
"""Multiplications that one of a QR decomposition takes as long as."""
_DENSE = 2**26
"""Numbers in a matrix that has to be made, of a LoHa or a Tucker decomposition."""
_SMALL = 256
"""Rows or columns of a matrix whose singular values are all computed."""
_DIRECTIONS, _ITERATIONS = 8, 6
"""Of subspace iteration, for others."""
_LOHA = (("w1_a", "w1_b", "t1"), ("w2_a", "w2_b", "t2"))


class DeltaSize(NamedTuple):
    """Of a ΔW, of a convolution as ``(m, n * h * w)``.

    Attributes:
        norm: Frobenius'.
        largest: singular value.
    """

    norm: float
    largest: float

    @property
    def stable_rank(self) -> float:
        """``norm² / largest²``: how many directions count, at most the rank; 0 of a ΔW of zeros."""
        return (self.norm / self.largest) ** 2 if self.largest else 0.0


@dataclass
class Measure:
    """Measures one adapter after the other, until so much was computed that a person would wait.

    Attributes:
        left: multiplications that may still be done.
    """

    left: float = _WORK

    def size_of(self, factors: Mapping[str, Array], scale: float) -> DeltaSize | None:
        """Of an adapter.

        Args:
            factors: by PEFT's and LyCORIS' names; all finite.
            scale: that ΔW has.

        Returns:
            None if it is too large to be computed, the factors do not belong together, or the result is not finite.
        """
        try:
            with np.errstate(all="ignore"):
                size = self._size(factors)
        except (ValueError, IndexError, np.linalg.LinAlgError):
            return None
        if size is None:
            return None
        scaled = DeltaSize(size.norm * abs(scale), size.largest * abs(scale))
        return scaled if all(map(math.isfinite, scaled)) else None

    def _size(self, factors: Mapping[str, Array]) -> DeltaSize | None:
        if "lora_A" in factors:
            return self._of_lora(factors["lora_B"], factors["lora_A"], factors.get("lora_mid"))
        if "hada_w1_a" in factors:
            return self._of_loha(factors)
        one, other = (self._of_half(factors, half) for half in ("lokr_w1", "lokr_w2"))
        return DeltaSize(one.norm * other.norm, one.largest * other.largest) if one and other else None

    def _of_lora(self, up: Array, down: Array, core: Array | None = None) -> DeltaSize | None:
        flat = down.reshape(len(down), -1)
        if core is not None:
            made = self._made("rshw,sn->rnhw", core, flat)
            return None if made is None else self._of_product(up.reshape(len(up), -1), made.reshape(len(made), -1))
        if math.prod(up.shape[2:]) > 1:
            made = self._made("mrhw,rn->mnhw", up, flat)
            return None if made is None else self._of_matrix(made.reshape(len(made), -1))
        return self._of_product(up.reshape(len(up), -1), flat)

    def _of_product(self, up: Array, down: Array) -> DeltaSize | None:
        """Of ``up @ down``."""
        rows, columns = len(up), down.shape[1]
        if up.shape[1] != len(down) or not min(up.shape) or not min(down.shape):
            raise ValueError("no pair of factors")
        if not self._affords(_QR * (rows + columns) * len(down) ** 2):
            return None
        left, right = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (up, down.T))
        return self._of_matrix(left @ right.T)

    def _of_loha(self, factors: Mapping[str, Array]) -> DeltaSize | None:
        """Of ``(W1a W1b) ⊙ (W2a W2b)``, of a Tucker decomposition with cores."""
        halves = [self._half(*(factors.get(f"hada_{name}") for name in names)) for names in _LOHA]
        if halves[0] is None or halves[1] is None:
            return None
        if halves[0].shape != halves[1].shape:
            raise ValueError("no pair of halves")
        return self._of_matrix(halves[0] * halves[1])

    def _half(self, first: Array | None, second: Array | None, core: Array | None) -> Array | None:
        """``first @ second``; with a core ``(r, s, h, w)`` of ``(r, m)`` and ``(s, n)``, as ``(m, n * h * w)``."""
        if first is None or second is None:
            raise ValueError("a factor is missing")
        if core is None:
            made = self._made("ab,bc->ac", first, second.reshape(len(second), -1))
        else:
            made = self._made("ijkl,ip,jr->prkl", core, first, second)
        return None if made is None else made.reshape(len(made), -1)

    def _of_half(self, factors: Mapping[str, Array], name: str) -> DeltaSize | None:
        """Of a factor of a Kronecker product: its singular values are multiplied with the other's."""
        if name in factors:
            return self._of_matrix(factors[name].reshape(len(factors[name]), -1))
        first, second = factors[f"{name}_a"], factors[f"{name}_b"]
        core = factors.get("lokr_t2") if name == "lokr_w2" else None
        if core is None:
            return self._of_product(first.reshape(len(first), -1), second.reshape(len(second), -1))
        made = self._half(first, second, core)
        return None if made is None else self._of_matrix(made)

    def _made(self, how: str, *factors: Array) -> Array | None:
        """What ``einsum`` makes of factors, if that and what comes between is not too large."""
        names, result = how.split("->")
        sides: dict[str, int] = {}
        for letters, factor in zip(names.split(","), factors, strict=True):
            sides |= dict(zip(letters, factor.shape, strict=True))
        summed = math.prod(side for letter, side in sides.items() if letter not in result)
        whole = math.prod(sides[letter] for letter in result)
        between = max(whole, *(whole // sides[letter] * summed if sides[letter] else 0 for letter in result))
        if between > _DENSE or not self._affords(whole * summed):
            return None
        return np.asarray(np.einsum(how, *factors, optimize=True))

    def _of_matrix(self, matrix: Array) -> DeltaSize | None:
        if min(matrix.shape) > _SMALL:
            return _of_large(matrix) if self._affords(matrix.size * 2 * _DIRECTIONS * _ITERATIONS) else None
        if not self._affords(_QR * matrix.size * min(matrix.shape)):
            return None
        values = np.linalg.svd(matrix, compute_uv=False)
        return DeltaSize(float(np.linalg.norm(values)), float(values.max(initial=0.0)))

    def _affords(self, work: float) -> bool:
        if work > self.left:
            return False
        self.left -= work
        return True


def _of_large(matrix: Array) -> DeltaSize:
    """By subspace iteration: all singular values would take minutes. The largest comes out some hundredths too small
    where many are nearly as large."""
    norm = float(np.linalg.norm(matrix))
    if not norm or not math.isfinite(norm):
        return DeltaSize(norm, norm)
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], _DIRECTIONS)).astype(matrix.dtype)
    for _ in range(_ITERATIONS):
        start = matrix.T @ (matrix @ np.linalg.qr(start).Q)
    values = np.linalg.svd(matrix @ np.linalg.qr(start).Q, compute_uv=False)
    return DeltaSize(norm, float(values.max(initial=0.0)))
