"""What optimizers need that normalise a LoRA step in orthonormal coordinates of the partner factor.

With ``B = Q R`` (``Q`` orthonormal) the weight sees ``δA`` as ``Q (R δA)``, so ``R δA`` (``r × n``) is a step in honest
units and its gradient is ``R⁻ᵀ gA = s QᵀG``. The same holds for ``B`` with ``A`` as the partner. Any orthonormal basis
serves; here it comes from the Cholesky factor of the Gram matrix, so the only work on tall matrices is products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreamlora import linalg
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._kernels import MOMENTUM, compute_dtype
from dreamlora.optimizers._pairs import Group
from dreamlora.optimizers._refresh import keep_state, stacked_state

# Factors that are worked on together, in elements. CPU: what stays in the cache. GPU: few launches.
_TOGETHER = {"cpu": 2**20}
_TOGETHER_DEFAULT = 2**27
WHITENING, BACK = "whitening", "back"
"""What the matrices to and from partner coordinates are called in the state of a factor."""
PAIRS_OF_THE_RATE = 64
"""Pairs that train together where ``layer_power`` leaves a step as it is."""


@dataclass(frozen=True)
class Side:
    """One factor of ``b`` pairs of one shape; matrices of the factor's shape are stacked.

    Attributes:
        params: the A, ``(r, n)`` each, or the B, ``(m, r)`` each (kernels flattened when stacked).
        wide: whether these are the A.
        scaling: ``s`` of the pairs.
    """

    params: list[Tensor]
    wide: bool
    scaling: float

    def stack(self, dtype: torch.dtype | None = None) -> Tensor:
        """``(b, r, n)`` or ``(b, m, r)`` in at least float32 (or ``dtype``); always a copy."""
        stacked = torch.stack(self.params).flatten(2)
        return stacked.to(dtype or compute_dtype(stacked.dtype))

    def gradients(self) -> list[Tensor]:
        """In the shape of the parameters and at least float32; a missing one is zero."""
        dtype = compute_dtype(self.params[0].dtype)
        return [torch.zeros_like(p, dtype=dtype) if p.grad is None else p.grad.to(dtype) for p in self.params]

    def state(self, optimizer: Optimizer, key: str) -> Tensor:
        """A state of the parameters' shape ``(b, *shape)``; it changes with what is returned."""
        p = self.params[0]
        return stacked_state(optimizer, self.params, key, tuple(p.shape), compute_dtype(p.dtype))

    def product(self, T: Tensor, X: Tensor) -> Tensor:
        """``T X`` for A and ``X Tᵀ`` for B: ``T`` ``(b, r, r)`` on the rank dimension of ``X``."""
        return T @ X if self.wide else X @ T.mT

    def gram(self, X: Tensor, Y: Tensor) -> Tensor:
        """``X Yᵀ`` for A and ``Xᵀ Y`` for B: ``(b, r, r)``."""
        return X @ Y.mT if self.wide else X.mT @ Y

    def length(self) -> int:
        """``n`` or ``m``: entries per rank direction."""
        return self.params[0].numel() // self.params[0].shape[0 if self.wide else 1]

    def move(self, T: Tensor, X: Tensor, keep: float, factor: float) -> None:
        """``p ← keep·p + factor·product(T, X)``, for the parameters that have a gradient.

        On the CPU one by one and in place, as copying them together takes longer than the products do.
        """
        p, dtype = self.params[0], X.dtype
        if p.device.type == "cpu" and p.dtype == dtype and all(p.is_contiguous() for p in self.params):
            for p, t, x in zip(self.params, T.unbind(), X.unbind(), strict=True):
                if p.grad is not None:
                    left, right = (t, x) if self.wide else (x, t.mT)
                    p.flatten(1).addmm_(left, right, beta=keep, alpha=factor)
            return
        left, right = (T, X) if self.wide else (X, T.mT)
        moved = torch.baddbmm(self.stack(), left, right, beta=keep, alpha=factor)
        parts = [(p, x.view(p.shape)) for p, x in zip(self.params, moved.unbind(), strict=True) if p.grad is not None]
        if parts:
            torch._foreach_copy_([p for p, _ in parts], [x for _, x in parts])


@dataclass(frozen=True)
class Coordinates:
    """Where the partners stand ``(k, r, r)``, in ``linalg.gram_dtype``.

    Attributes:
        K: the partners' Gram matrices.
        whitening: ``E`` with ``E K Eᵀ = I``, which makes gradients to those in partner coordinates. It is zero in
            directions in which the partner has no length: there the gradient is rounding.
        back: ``Eᵀ``, from steps in partner coordinates to steps of the factors; zero there, too.
        failed: ``(k,)``: the partner's Gram matrix could not be factored; ``E`` is zero there.
    """

    K: Tensor
    whitening: Tensor
    back: Tensor
    failed: Tensor


class RankSpace:
    """Pairs of one group that share rank, device and dtype, with their partners' coordinates in one batch.

    Attributes:
        group: the parameter group.
        sides: the A of every batch, then the B of every batch: ``k`` factors, and those at ``i ± k/2`` are partners.
        size: what rank and number of pairs make of a step's length: ``r^-rank_power · (pairs/64)^-layer_power``.
    """

    def __init__(self, group: Group, batches: list[PairBatch], pairs: int) -> None:
        self.group = group
        self.sides = [Side(batch.A, True, batch.scalings[0]) for batch in batches]
        self.sides += [Side(batch.B, False, batch.scalings[0]) for batch in batches]
        self.params = [p for side in self.sides for p in side.params]
        p = self.params[0]
        self.rank, self.device, self.dtype = p.shape[0], p.device, compute_dtype(p.dtype)
        self.gram_dtype = linalg.gram_dtype(p.device)
        self.size = self.rank ** -group["rank_power"] * (pairs / PAIRS_OF_THE_RATE) ** -group["layer_power"]

    def momenta(self, optimizer: Optimizer) -> list[Tensor]:
        """The running means of the gradients with this step's in them, by side: ``(b, r, n)`` or ``(b, m, r)``."""
        means = []
        for side in self.sides:
            mean = side.state(optimizer, MOMENTUM)
            torch._foreach_lerp_(list(mean.unbind()), side.gradients(), 1 - self.group["momentum"])
            means.append(mean.flatten(2))
        return means

    def coordinates(self) -> Coordinates:
        """Of the partners as they are now."""
        factors = (side.stack(self.gram_dtype) for side in self.sides)
        K = torch.cat([side.gram(x, x) for side, x in zip(self.sides, factors, strict=True)])
        broken = ~torch.isfinite(linalg.mean_eigenvalue(K))
        K_A, K_B = torch.where(broken, 0.0, K).chunk(2)
        damping = max(self.group["damping"], linalg.rounding_level(self.params[0].dtype, self.gram_dtype))
        of_A = linalg.orthonormal_coordinates(K_A, damping)
        # The coordinates of B are found where the rows of A are orthonormal: what is damped there is a direction of the
        # product, while the short directions of B alone are others in every factorisation.
        identity = torch.eye(self.rank, dtype=K_A.dtype, device=self.device)
        F = torch.where(linalg.mean_eigenvalue(K_A) <= linalg.TAU_MIN, identity, of_A.E @ K_A)
        of_B = linalg.orthonormal_coordinates(linalg.symmetric(F @ K_B @ F.mT), damping)
        E, failed = torch.cat([of_B.E @ F, of_A.E]), torch.cat([of_B.failed | of_A.failed, of_A.failed])
        failed = failed | self.of_partners(broken)[:, 0, 0]
        # the power makes up for ``E``, which is largest just where K is mere rounding
        share = torch.linalg.matrix_power(torch.cat([of_B.share, of_A.share]), 4)
        return Coordinates(torch.cat([K_B, K_A]), share @ E, E.mT @ share, failed)

    def whitened(self, stacked: list[Tensor], whitening: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradient-like matrices in partner coordinates, by side, and their Gram matrices ``(k, r, r)``.

        Args:
            stacked: by side, ``(b, r, n)`` or ``(b, m, r)``.
            whitening: ``(k, r, r)``.
        """
        parts = [side.product(T, x) for side, T, x in zip(self.sides, self.split(whitening), stacked, strict=True)]
        return parts, torch.cat([side.gram(u, u) for side, u in zip(self.sides, parts, strict=True)])

    def back(self, at: Coordinates, row_norms: list[float]) -> Tensor:
        """``(k, r, r)``: from whitened directions to steps of the factors, ``Eᵀ D``.

        Args:
            row_norms: by side, how long a rank direction of the whitened step is; ``trusted`` makes ``D`` of it.
        """
        if not self.group["trust"]:
            return at.back
        for_A, for_B = at.back.chunk(2)
        (K, own), E = at.K.chunk(2), at.whitening.chunk(2)[0]
        return torch.cat([for_A @ self.trusted(E, K, own, row_norms), for_B])

    def trusted(self, E: Tensor, K: Tensor, own: Tensor, row_norms: list[float]) -> Tensor:
        """``D = W(W + c²I)⁻¹`` ``(k/2, r, r)`` for A, with ``c = η·row_norm/(2·trust)``.

        ``W = SSᵀ``, where ``S`` is ``BA`` in orthonormal bases (``r × r``): D shortens A's step where the singular
        values of ``BA`` are below ``c``. There B has hardly any length, so that the step of A that moves ``BA`` by
        ``η`` is many times A itself. With D, ``‖K_A^-½ δA‖ <= trust``. As the singular values of the product decide
        and not the factors', this is the same for every factorisation. B needs no bound: A starts with length in every
        direction. Where A is zero, D is the identity.

        Args:
            E, K: whitening and Gram matrices of B ``(k/2, r, r)``.
            own: Gram matrices of A.
            row_norms: by side, how long a rank direction of the whitened step is.
        """
        identity = torch.eye(self.rank, dtype=own.dtype, device=own.device)
        steps = [self.rates(side)[0] * norm for side, norm in zip(self.sides, row_norms, strict=True) if side.wide]
        c2 = self.per_factor([step / (2 * self.group["trust"]) for step in steps]).square()
        F = E @ K
        W = linalg.symmetric(F @ own @ F.mT)
        free = (c2 == 0) | (linalg.mean_eigenvalue(own) <= linalg.TAU_MIN)
        scale = torch.where(free, 1.0, linalg.mean_eigenvalue(W) + c2)
        level = torch.where(free, 0.0, c2 / scale)
        W = torch.where(free, identity, W / scale)
        return W @ linalg.spd_inverse(W + level * identity).P

    def of_partners(self, stacked: Tensor) -> Tensor:
        """``(k, ...)`` by factor, in the order of their partners."""
        return torch.cat(stacked.chunk(2)[::-1])

    def split(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """``(k, ...)`` by side."""
        return stacked.split([len(side.params) for side in self.sides])

    def per_factor(self, numbers: list[float]) -> Tensor:
        """``(k, 1, 1)`` of one number by side (``(k/2, 1, 1)`` if for A alone), made on the device itself."""
        sides = zip(self.sides, numbers, strict=False)
        filled = [torch.full((len(s.params), 1, 1), x, dtype=self.gram_dtype, device=self.device) for s, x in sides]
        return torch.cat(filled)

    def state(self, optimizer: Optimizer, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """``(k, *shape)``: a small state of all factors; it changes with what is returned."""
        return stacked_state(optimizer, self.params, key, shape, dtype)

    def matrix(self, optimizer: Optimizer, key: str) -> Tensor:
        """``(k, r, r)``: a matrix of every factor, in the precision of the data."""
        return self.state(optimizer, key, (self.rank, self.rank), self.dtype)

    def keep(self, optimizer: Optimizer, key: str, stacked: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Make ``stacked`` ``(k, ...)`` the state of the factors, in the precision of the data (or ``dtype``)."""
        return keep_state(optimizer, self.params, key, stacked.to(dtype or self.dtype).contiguous())

    def rates(self, side: Side) -> tuple[float, float]:
        """Learning rate of a side (divided by ``s`` where that is wanted) and what of a factor a step leaves."""
        lr = float(self.group["lr"]) * (1.0 if side.wide else self.group["lr_ratio_B"])
        scale = abs(side.scaling) if self.group["scale_correction"] else 1.0
        return lr / scale, lr * self.group["weight_decay"]

    def move(self, side: Side, T: Tensor, X: Tensor, size: float) -> None:
        """``X ← c X − η·size·product(T, X)/c``, ``c = √(1 − η·wd)``: the product ``BA`` decays by ``1 − η·wd``."""
        lr, decay = self.rates(side)
        c = math.sqrt(1 - decay)
        side.move(T, X, keep=c, factor=(1.0 if self.group["maximize"] else -1.0) * lr * size / c)


def check_product_decay(group: Group) -> None:
    """Raise ValueError if a step of ``RankSpace.move`` would leave nothing of a factor."""
    decay = float(group["lr"]) * max(1.0, group["lr_ratio_B"]) * group["weight_decay"]
    if group["lora_pairs"] and decay >= 1:
        raise ValueError(f"weight_decay: got lr × weight_decay = {decay:g}, must be below 1")


def rank_spaces(group: Group, batches: list[PairBatch], pairs: int) -> Iterator[RankSpace]:
    """The pairs of a group by rank, device and dtype, in portions of a bounded size.

    Args:
        pairs: of the whole optimizer.
    """
    alike: dict[Any, list[PairBatch]] = {}
    for batch in batches:
        p = batch.A[0]
        alike.setdefault((p.shape[0], p.device, p.dtype), []).append(batch)
    for members in alike.values():
        room = _TOGETHER.get(members[0].A[0].device.type, _TOGETHER_DEFAULT)
        portion: list[PairBatch] = []
        for batch in members:
            if portion and sum(map(_elements, portion)) + _elements(batch) > room:
                yield RankSpace(group, portion, pairs)
                portion = []
            portion.append(batch)
        yield RankSpace(group, portion, pairs)


def _elements(batch: PairBatch) -> int:
    return len(batch.A) * (batch.A[0].numel() + batch.B[0].numel())
