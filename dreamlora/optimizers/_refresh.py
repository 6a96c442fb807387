"""Optimizers whose ``r × r`` matrices serve for several steps: when they are made anew, where they lie meanwhile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer

REFRESHED_EACH = 20
"""In the first steps B grows from zero by much of its length, so matrices are made anew in each of them."""
RISE = 1.25
"""Matrices bound the step of A (``trust``) for the learning rate at which they were made, and one so much higher."""
_STEPS, _PRESENT, _RATE = "steps", "pairs_with_gradient", "lr_of_matrices"


class RefreshingOptimizer(LoraPairOptimizer):
    """An optimizer that makes matrices of the factors anew in every ``refresh``-th step, and keeps them in its state.

    The groups count the steps ("steps") on the host, so that no step waits for a GPU, and a resumed run goes on with
    the same matrices. The count starts again when other pairs than in the step before have a gradient: some of these
    may have no matrices, or very old ones. Where the learning rate rises by much (a schedule that starts again), they
    are made anew as well.
    """

    def __init__(self, params: list[Group], defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, _STEPS: 0, _PRESENT: "", _RATE: 0.0})

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _checks.whole_number("refresh", group["refresh"], 1)

    def begin_step(self, group: Group, batches: list[PairBatch]) -> tuple[bool, bool]:
        """Count a step of the group; whether its matrices are made anew in this one, and in the next."""
        present = _pairs_with_gradient(group, batches)
        step = group[_STEPS] if present == group[_PRESENT] else 0
        group[_STEPS], group[_PRESENT] = step + 1, present
        rate = float(group["lr"])
        due = _is_due(step, group["refresh"]) or rate > RISE * group[_RATE]
        if due:
            group[_RATE] = rate
        return due, _is_due(step + 1, group["refresh"])


def _is_due(step: int, refresh: int) -> bool:
    return step < REFRESHED_EACH or step % refresh == 0


def _pairs_with_gradient(group: Group, batches: list[PairBatch]) -> str:
    """A text that is the same for the same pairs."""
    if 2 * sum(len(batch.A) for batch in batches) == len(group["params"]):
        return "all"
    gradients = [p.grad is not None for p in group["params"]]
    return "".join(str(int(A or B)) for A, B in zip(gradients[0::2], gradients[1::2], strict=True))


def stacked_state(
    optimizer: Optimizer, params: list[Tensor], key: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A state of all parameters in one tensor ``(k, *shape)``; zero where there is none yet.

    From then on the states are parts of that tensor: changing it changes them, and the next step finds it whole.
    """
    values = [optimizer.state[p].get(key) for p in params]
    whole = None if torch.compiler.is_compiling() or values[0] is None else values[0]._base  # no traced tensor has one
    if whole is not None and len(whole) == len(values):
        start, size = whole.data_ptr(), whole[0].nbytes
        ordered = enumerate(values)
        if all(v is not None and v._base is whole and v.data_ptr() == start + i * size for i, v in ordered):
            return whole.view(len(values), *shape)
    device = params[0].device
    zero = torch.zeros(shape, dtype=dtype, device=device) if any(v is None for v in values) else None
    parts = [zero if v is None else v for v in values]
    return keep_state(optimizer, params, key, torch.stack([part for part in parts if part is not None]))


def keep_state(optimizer: Optimizer, params: list[Tensor], key: str, stacked: Tensor) -> Tensor:
    """Make the parts of ``stacked`` ``(k, ...)`` the states of the parameters, in order; gives it back."""
    for p, part in zip(params, stacked.unbind(), strict=True):
        optimizer.state[p][key] = part
    return stacked
