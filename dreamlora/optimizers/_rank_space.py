"""What optimizers need that normalise a LoRA step in orthonormal coordinates of the partner factor.

With ``B = Q R`` (``Q`` orthonormal) the weight sees ``δA`` as ``Q (R δA)``, so ``R δA`` (``r × n``) is a step in honest
units and its gradient is ``R⁻ᵀ gA = s QᵀG``. The same holds for ``B`` with ``A`` as the partner. Any orthonormal basis
serves; here it comes from the Cholesky factor of the Gram matrix, so the only work on tall matrices is products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._kernels import compute_dtype
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer


@dataclass(frozen=True)
class Side:
    """One factor of ``b`` pairs of one shape; matrices of the factor's shape are stacked.

    Attributes:
        params: the A, ``(r, n)`` each, or the B, ``(m, r)`` each (kernels flattened when stacked).
        wide: whether these are the A.
        scalings: ``s`` of every pair.
    """

    params: list[Tensor]
    wide: bool
    scalings: list[float]

    def stack(self, tensors: list[Tensor]) -> Tensor:
        """``(b, r, n)`` or ``(b, m, r)`` in at least float32; always a copy."""
        stacked = torch.stack(tensors).flatten(2)
        return stacked.to(compute_dtype(stacked.dtype))

    def momenta(self, optimizer: LoraPairOptimizer, key: str) -> Tensor:
        """A state of the factors' shape, stacked; zero where there is none yet. Not to be changed."""
        states = [optimizer.state[p] for p in self.params]
        for p, state in zip(self.params, states, strict=True):
            if key not in state:
                state[key] = torch.zeros_like(p, dtype=compute_dtype(p.dtype))
        first = None if torch.compiler.is_compiling() else states[0][key]._base  # a view's base is no traced tensor
        whole = first is not None and len(first) == len(states) and all(s[key]._base is first for s in states)
        if first is not None and whole and states[0][key].data_ptr() == first.data_ptr():
            return first  # as keep_momenta left them
        return self.stack([state[key] for state in states])

    def keep_momenta(self, optimizer: LoraPairOptimizer, key: str, stacked: Tensor) -> None:
        """Make the parts of ``stacked`` the states of the parameters, in order and without a copy."""
        for p, part in zip(self.params, stacked.unbind(), strict=True):
            optimizer.state[p][key] = part.view(p.shape)

    def gradients(self) -> Tensor:
        """Stacked gradients; a missing one counts as zero."""
        return self.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params])

    def product(self, T: Tensor, X: Tensor) -> Tensor:
        """``T X`` for A and ``X Tᵀ`` for B: ``T`` ``(b, r, r)`` on the rank dimension of ``X``."""
        return T @ X if self.wide else X @ T.mT

    def combine(self, onto: Tensor, T: Tensor, X: Tensor, keep: float = 1.0, factor: float = 1.0) -> Tensor:
        """``keep·onto + factor·product(T, X)``, without a temporary for the product."""
        left, right = (T, X) if self.wide else (X, T.mT)
        return torch.baddbmm(onto, left, right, beta=keep, alpha=factor)

    def gram(self, X: Tensor, Y: Tensor) -> Tensor:
        """``X Yᵀ`` for A and ``Xᵀ Y`` for B: ``(b, r, r)``."""
        return X @ Y.mT if self.wide else X.mT @ Y

    def length(self) -> int:
        """``n`` or ``m``: entries per rank direction."""
        return self.params[0].numel() // self.params[0].shape[0 if self.wide else 1]

    def write(self, old: Tensor, new: Tensor) -> Tensor:
        """Set the parameters that have a gradient to ``new``; the Gram matrix ``(b, r, r)`` of change and ``old``.

        The change is what the parameters, which may be of low precision, really did.
        """
        still = [i for i, p in enumerate(self.params) if p.grad is None]
        for i in still:
            new[i] = old[i]
        moved = [(p, x) for i, (p, x) in enumerate(zip(self.params, new.unbind(), strict=True)) if i not in still]
        if moved:
            torch._foreach_copy_([p for p, _ in moved], [x.view(p.shape) for p, x in moved])
        dtype = self.params[0].dtype
        rounded = new if dtype == new.dtype else new.to(dtype).to(new.dtype)
        # in full precision: coordinates of weak directions magnify what is lost here by the root of rounding_level
        wide = linalg.gram_dtype(new.device)
        return self.gram((rounded - old).to(wide), old.to(wide))


class RankSpace:
    """All factors of one group that share rank, device and dtype, with their partners' coordinates in one batch.

    Attributes:
        group: the parameter group.
        sides: A and B of every batch in turn; the partner of ``sides[i]`` is ``sides[i ^ 1]``.
        K: partners' Gram matrices ``(k, r, r)`` in ``linalg.gram_dtype``.
        E: ``linalg.orthonormal_coordinates`` of ``K``.
        failed: ``(k,)``: the partner's Gram matrix could not be factored; ``E`` is zero there.
    """

    def __init__(self, group: Group, batches: list[PairBatch], damping: float) -> None:
        self.group = group
        self.sides = [side for b in batches for side in (Side(b.A, True, b.scalings), Side(b.B, False, b.scalings))]
        p = self.sides[0].params[0]
        self.device, self.dtype = p.device, compute_dtype(p.dtype)
        self.gram_dtype = linalg.gram_dtype(p.device)
        grams = []
        for side in self.sides:
            factor = side.stack(side.params).to(self.gram_dtype)
            grams.append(side.gram(factor, factor))
        self.K = torch.cat([grams[i ^ 1] for i in range(len(grams))])
        level = linalg.rounding_level(p.dtype, self.gram_dtype)
        self.E, self.failed = linalg.orthonormal_coordinates(self.K, max(damping, level))
        self.ready = linalg.range_projection(self.E, self.K)

    def whitened(self, stacked: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Gradient-like matrices in partner coordinates (``E g``), by side, and the mean of their outer products.

        Returns:
            by side ``(b, r, n)`` or ``(b, m, r)``; and ``(k, r, r)`` in ``gram_dtype``: ``U Uᵀ / n``.
        """
        parts, moments = [], []
        for side, E, x in zip(self.sides, self.split(self.E), stacked, strict=True):
            u = side.product(E.to(self.dtype), x)
            parts.append(u)
            # in full precision, else a Gram matrix of fewer gradient directions than ranks is not even semi-definite
            full = u.to(self.gram_dtype)
            moments.append(side.gram(full, full) / side.length())
        return parts, torch.cat(moments)

    def back(self, row_norms: list[float]) -> Tensor:
        """``(k, r, r)``: from whitened directions to steps of the factors, ``Eᵀ D`` with damped directions left out.

        Args:
            row_norms: by side, how long a rank direction of the whitened step is; ``_trusted`` makes ``D`` of it.
        """
        back = self.E.mT @ self.ready
        if self.group["trust"]:
            back = back @ self._trusted(row_norms)
        if self.group["scale_correction"]:
            back = back / self.per_factor([abs(s) for side in self.sides for s in side.scalings])
        return back

    def _trusted(self, row_norms: list[float]) -> Tensor:
        """``D = W(W + c²I)⁻¹`` ``(k, r, r)`` for A, with ``c = η·row_norm/(2·trust)``; the identity for B.

        ``W = SSᵀ``, where ``S`` is ``BA`` in orthonormal bases (``r × r``): D shortens A's step where the singular
        values of ``BA`` are below ``c``. There B has hardly any length, so that the step of A that moves ``BA`` by
        ``η`` is many times A itself. With D, ``‖K_A^-½ δA‖ <= trust``. As the singular values of the product decide
        and not the factors', this is the same for every factorisation. B needs no bound: A starts with length in every
        direction. Where A is zero, D is the identity.
        """
        own = torch.cat([K for A, B in _by_two(self.split(self.K)) for K in (B, A)])
        identity = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
        reach = []
        for side, norm in zip(self.sides, row_norms, strict=True):
            step = self.rates(side)[0] * norm if side.wide else 0.0
            reach += [step / (abs(s) if self.group["scale_correction"] else 1.0) for s in side.scalings]
        c2 = (self.per_factor(reach) / (2 * self.group["trust"])).square()
        F = self.E @ self.K
        W = linalg.symmetric(F @ own @ F.mT)
        free = (c2 == 0) | (linalg.mean_eigenvalue(own) <= linalg.TAU_MIN)
        scale = torch.where(free, 1.0, linalg.mean_eigenvalue(W) + c2)
        level = torch.where(free, 0.0, c2 / scale)
        W = torch.where(free, identity, W / scale)
        return W @ linalg.spd_inverse(W + level * identity).P

    def split(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """``(k, ...)`` by side."""
        return stacked.split([len(side.params) for side in self.sides])

    def lengths(self) -> Tensor:
        """``(k, 1, 1)``: ``n`` of every A, ``m`` of every B."""
        return self.per_factor([float(side.length()) for side in self.sides for _ in side.params])

    def per_factor(self, numbers: list[float]) -> Tensor:
        """``(k, 1, 1)``, without waiting for the device."""
        return torch.tensor(numbers, dtype=self.gram_dtype).to(self.device, non_blocking=True)[:, None, None]

    def state(self, optimizer: LoraPairOptimizer, key: str) -> Tensor:
        """``(k, ...)``: a small state of all parameters."""
        return torch.stack([optimizer.state[p][key] for side in self.sides for p in side.params])

    def keep(self, optimizer: LoraPairOptimizer, key: str, stacked: Tensor) -> None:
        """The opposite of ``state``."""
        params = [p for side in self.sides for p in side.params]
        for p, value in zip(params, stacked.unbind(), strict=True):
            optimizer.state[p][key] = value

    def rates(self, side: Side) -> tuple[float, float]:
        """Learning rate and weight decay of a side."""
        lr = float(self.group["lr"]) * (1.0 if side.wide else self.group["lr_ratio_B"])
        return lr, self.group["weight_decay"]


def _by_two(items: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(items[0::2], items[1::2], strict=True)


def rank_spaces(work: list[tuple[Group, list[PairBatch]]]) -> Iterator[RankSpace]:
    """The pairs of all groups by group, rank, device and dtype."""
    for group, batches in work:
        alike: dict[Any, list[PairBatch]] = {}
        for batch in batches:
            p = batch.A[0]
            alike.setdefault((p.shape[0], p.device, p.dtype), []).append(batch)
        for members in alike.values():
            yield RankSpace(group, members, group["damping"])


def count(total: dict[torch.device, Tensor], flags: Tensor) -> None:
    """Add the number of true flags to the device's total, without waiting for the device."""
    number = flags.sum()
    total[number.device] = total[number.device] + number if number.device in total else number
