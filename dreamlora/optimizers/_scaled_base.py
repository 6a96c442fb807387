"""What Scaled GD and Scaled AdamW share: from gradients to scaled gradients, and from normalised steps to steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers import _scaled_options
from dreamlora.optimizers._batch import PairBatch, moves_of, stack
from dreamlora.optimizers._kernels import as_number, move_
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer
from dreamlora.optimizers._preconditioners import (
    PreconditionerRecipe,
    Scaling,
    remove_double_count,
    scalings,
    transport,
)

# A Gram matrix has twice the factor's condition number in digits; with less damping float32 Cholesky can fail.
_SAFE_DAMPING = 1e-4
# Pairs are updated in portions of so many elements: enough for one kernel, few enough for the cache.
_PORTION = {"cpu": 2**19}
_PORTION_DEFAULT = 2**24


def scaled_gradients(gA: Tensor, gB: Tensor, P_B: Tensor, P_A: Tensor) -> tuple[Tensor, Tensor]:
    """``g̃A = (BᵀB + λI)⁻¹ gA`` and ``g̃B = gB (AAᵀ + λI)⁻¹``: each gradient is scaled by the other factor.

    Without damping the step ``−η g̃`` moves the weight by ``−η s² (P_col(B) G + G P_row(A))`` to first order, however
    ``BA`` is split into factors.

    Args:
        gA, gB: gradients ``(b, r, n)`` and ``(b, m, r)``.
        P_B, P_A: damped inverses ``(b, r, r)`` of ``BᵀB`` and of ``AAᵀ``.
    """
    return P_B @ gA, gB @ P_A


class _Frame(NamedTuple):
    """A batch at the point where its gradient was taken.

    Attributes:
        factors: A ``(b, r, n)`` and B ``(b, m, r)``, if they are needed, else nothing.
        for_A, for_B: what scales the gradients.
    """

    batch: PairBatch
    factors: tuple[Tensor, ...]
    for_A: Scaling
    for_B: Scaling


class _Move(NamedTuple):
    """One side of a batch: parameters, their stacked directions, and what multiplies the normalised step, if anything.

    Attributes:
        from_left: ``after`` multiplies from the left (A) or from the right (B).
    """

    params: list[Tensor]
    direction: Tensor
    after: Tensor | None
    from_left: bool


class ScaledBase(LoraPairOptimizer):
    """A method that scales each factor's gradient by the other factor; see ``_scaled`` for its options."""

    _NORMALISES: bool
    """The step does not depend on the size of the gradient, so that it grows with ``s = alpha/r``, and else with s²."""
    _MOMENTUM_KEY: str

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _scaled_options.check(group)

    def added_settings(self, saved: Group) -> Group:
        return {**super().added_settings(saved), "unscaled_below": 0.0}

    def update_pairs(self, group: Group, batches: list[PairBatch]) -> None:
        recipe = PreconditionerRecipe.of(group, self._NORMALISES)
        for sides in ("AB",) if group["order"] == "jacobi" else ("A", "B"):
            frames = self._frames(group, recipe, batches)
            for portion in _portions(frames):
                self._update_portion(group, portion, sides)
            if group["transport_momentum"]:
                self._transport(frames, self._frames(group, recipe, batches), sides)

    def descend(self, group: Group, params: list[Tensor], directions: list[Tensor], states: list[Any]) -> None:
        """Update ``params`` and ``states`` in place along directions, with the hyper-parameters of ``group``."""
        raise NotImplementedError

    def _update_portion(self, group: Group, frames: list[_Frame], sides: str) -> None:
        """Update the factors named in ``sides`` ("A", "B" or "AB"). All of the portion have one scaling ``s``."""
        moves: dict[str, list[_Move]] = {"A": [], "B": []}
        for frame in frames:
            uA, uB = self._directions(group, frame)
            moves["A"].append(_Move(frame.batch.A, uA, frame.for_A.after, True))
            moves["B"].append(_Move(frame.batch.B, uB, frame.for_B.after, False))
        together = [moves["A"] + moves["B"]] if sides == "AB" and group["lr_ratio_B"] == 1.0 else None
        for side, some in zip(sides, together or [moves[side] for side in sides], strict=False):
            ratio = group["lr_ratio_B"] if side == "B" else 1.0
            self._apply(self._settings(group, ratio, frames[0].batch.scalings[0]), some)

    def _frames(self, group: Group, recipe: PreconditionerRecipe, batches: list[PairBatch]) -> list[_Frame]:
        """The batches as they are now. All matrices of one rank are inverted at once: they are small and many."""
        keep = group["geometry"] == "tangent" or group["transport_momentum"]
        kept: list[tuple[Tensor, ...]] = []
        grams: dict[object, list[tuple[int, Tensor, Tensor]]] = {}
        for i, batch in enumerate(batches):
            precise = group["damping"] < _SAFE_DAMPING
            A, B = batch.stacked_factors(linalg.gram_dtype(batch.A[0].device) if precise else None)
            # A batch of one pair is not copied, and must not change under the transport.
            kept.append(((A.clone(), B.clone()) if len(A) == 1 else (A, B)) if keep else ())
            alike = (A.shape[1], A.device, A.dtype)
            grams.setdefault(alike, []).append((i, linalg.gram_columns(B), linalg.gram_rows(A)))
        frames: dict[int, _Frame] = {}
        for members in grams.values():
            KB, KA = torch.cat([K for _, K, _ in members]), torch.cat([K for _, _, K in members])
            for_A, for_B, failed = scalings(KB, KA, recipe)
            self.count("fallbacks", failed)
            sizes = [len(K) for _, K, _ in members]
            for (i, _, _), of_A, of_B in zip(members, for_A.split(sizes), for_B.split(sizes), strict=True):
                frames[i] = _Frame(batches[i], kept[i], of_A, of_B)
        return [frames[i] for i in range(len(batches))]

    def _directions(self, group: Group, frame: _Frame) -> tuple[Tensor, Tensor]:
        """Scaled gradients ``(b, r, n)`` and ``(b, m, r)``."""
        gA, gB = frame.batch.stacked_gradients()
        if group["geometry"] == "tangent":
            A, B = (x.to(gA.dtype) for x in frame.factors)
            natural = frame.for_A.natural().to(gA.dtype), frame.for_B.natural().to(gA.dtype)
            gA, gB = remove_double_count(A, B, gA, gB, natural)
        return scaled_gradients(gA, gB, frame.for_A.before.to(gA.dtype), frame.for_B.before.to(gA.dtype))

    def _settings(self, group: Group, ratio: float, s: float) -> Group:
        """The group's hyper-parameters for one side of pairs of scaling ``s``."""
        if ratio == 1.0 and not group["scale_correction"]:
            return group
        size = (abs(s) if self._NORMALISES else s * s) if group["scale_correction"] else 1.0
        # The weight decays by lr · weight_decay whatever s is.
        return {**group, "lr": group["lr"] * ratio / size, "weight_decay": group["weight_decay"] * size}

    def _apply(self, settings: Group, moves: list[_Move]) -> None:
        """Update along scaled gradients; if there is an ``after``, by the normalised step times it."""
        afters = [move.after for move in moves if move.after is not None]
        if not afters:
            plain = [each for move in moves for each in moves_of(move.params, move.direction)]
            params = [p for p, _ in plain]
            self.descend(settings, params, [d for _, d in plain], [self.state[p] for p in params])
            return
        # The normalised step is what the method does to a parameter that is zero.
        steps = [torch.zeros_like(move.direction) for move in moves]
        targets = [each for move, step in zip(moves, steps, strict=True) for each in moves_of(move.params, step)]
        along = [d for move in moves for _, d in moves_of(move.params, move.direction)]
        unit = {**settings, "lr": 1.0, "weight_decay": 0.0}
        self.descend(unit, [step for _, step in targets], along, [self.state[p] for p, _ in targets])
        lr = as_number(settings["lr"])
        for move, step, matrix in zip(moves, steps, afters, strict=True):
            after = matrix.to(step.dtype) * lr
            shift = moves_of(move.params, after @ step if move.from_left else step @ after)
            move_([p for p, _ in shift], [d for _, d in shift], 1 - lr * settings["weight_decay"])

    def _transport(self, before: list[_Frame], now: list[_Frame], sides: str) -> None:
        """Carry the momentum of the partners of the factors that have moved."""
        for old, new in zip(before, now, strict=True):
            (old_A, old_B), (new_A, new_B) = old.factors, new.factors
            if "B" in sides:
                self._carry(old.batch.A, transport(old.for_A, new.for_A, new_B.mT @ old_B), True)
            if "A" in sides:
                self._carry(old.batch.B, transport(old.for_B, new.for_B, new_A @ old_A.mT), False)

    def _carry(self, params: list[Tensor], T: Tensor, from_left: bool) -> None:
        members = [i for i, p in enumerate(params) if self._MOMENTUM_KEY in self.state.get(p, {})]
        if not members:
            return
        momenta = [self.state[params[i]][self._MOMENTUM_KEY] for i in members]
        stacked = stack(momenta)
        # not T[members]: a list of indices goes to the GPU by a copy that waits for it
        T = (T if len(members) == len(params) else torch.stack([T[i] for i in members])).to(stacked.dtype)
        carried = T @ stacked if from_left else stacked @ T.mT
        torch._foreach_copy_(momenta, [m.view(old.shape) for m, old in zip(carried, momenta, strict=True)])


def _portions(frames: list[_Frame]) -> Iterator[list[_Frame]]:
    """Batches of one scaling and one device, put together until they are worth a kernel."""
    portion: list[_Frame] = []
    elements = 0
    for frame in frames:
        batch, device = frame.batch, frame.batch.A[0].device
        if portion:
            like = portion[0].batch
            alike = batch.scalings[0] == like.scalings[0] and device == like.A[0].device
            if elements >= _PORTION.get(device.type, _PORTION_DEFAULT) or not alike:
                yield portion
                portion, elements = [], 0
        portion.append(frame)
        elements += len(batch.A) * (batch.A[0].numel() + batch.B[0].numel())
    if portion:
        yield portion
