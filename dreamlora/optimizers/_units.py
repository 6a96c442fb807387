"""Start-normalised units: learning rates that know neither alpha, nor the scale of the start, nor the rank.

    A = c_A Ã        c_A = σ√n / √r
    B = c_B B̃        c_B = 1 / (√r |s| σ√n)        so that  s B A = ± B̃ Ã / r

with σ the root mean square of A at the start. An optimizer sees Ã and B̃ and their gradients, whose start and whose loss
do not depend on alpha or on the scale of A; so neither does its path, settings such as eps included. Its state lies in
these units, and the scales beside the parameters in its groups.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dreamlora.optimizers import _checks

Units = Literal["plain", "start"]
UNIT_SCALES = "unit_scales"
"""Key of a group: what each of its parameters is in terms of the one that the optimizer sees."""
_SWITCHES = ("train", "eval")
"""What moves the parameters of schedule-free optimizers, besides their step."""

_Optimizer = TypeVar("_Optimizer", bound=Optimizer)


def check_units(units: str) -> None:
    """Raise ValueError for units that there are not."""
    _checks.one_of("units", units, get_args(Units))


@torch.no_grad()
def unit_scales(A: Tensor, B: Tensor, scaling: float) -> tuple[float, float]:
    """``c_A`` and ``c_B`` of a pair at its start; from B in the same way where A is zero. A pair that has no effect
    (both are zero, or ``s`` is) keeps its units.

    Factors in half precision have the next powers of two, by which they are scaled without rounding: alpha and the
    start then drop out but for a factor of √2 at most.

    Args:
        A, B: ``(r, ...)`` and ``(m, r, ...)``; looked at on the CPU, where all processes find the same numbers.
        scaling: ``s``.
    """
    rank, s = A.shape[0], abs(scaling)
    of_A, of_B = (float(torch.linalg.vector_norm(x.detach().to("cpu", torch.float64))) for x in (A, B))
    if not s or not (of_A or of_B):
        return 1.0, 1.0
    # σ√n is ‖A‖ / √r
    c_A, c_B = (of_A / rank, 1 / (s * of_A)) if of_A else (1 / (s * of_B), of_B / rank)
    return (c_A, c_B) if torch.finfo(A.dtype).bits >= 32 else (_power_of_two(c_A), _power_of_two(c_B))


def scaling_in_units(scaling: float, c_A: float, c_B: float) -> float:
    """What ``B̃ Ã`` is multiplied by; pairs of one rank have the same to the last bit, so that they share kernels."""
    return float(f"{scaling * c_A * c_B:.9g}")


def measure_start(optimizer: Optimizer, pairs: Iterable[tuple[Tensor, Tensor, float]]) -> None:
    """Take the factors as they are now for the start, in an optimizer that has units and has made no step.

    Args:
        pairs: ``(A, B, scaling)`` of all pairs of the optimizer.
    """
    scales: dict[Tensor, float] = {}
    for A, B, scaling in pairs:
        scales[A], scales[B] = unit_scales(A, B, scaling)
    for group in optimizer.param_groups:
        if UNIT_SCALES in group:
            group[UNIT_SCALES] = [scales[p] for p in group["params"]]


def has_units(optimizer: Any) -> bool:
    """Whether a group of the optimizer is in units of the start."""
    return any(UNIT_SCALES in group for group in optimizer.param_groups)


def in_units(optimizer: _Optimizer) -> _Optimizer:
    """Have an optimizer of any package work in the units of its groups; those of this package do by themselves.

    Parameters and gradients are scaled in place around ``step``, ``train`` and ``eval``, and are the usual ones before
    and after, for step hooks too. The optimizer becomes one of a subclass of its own class: a step hook would be called
    twice where a ``step`` calls its base class's, and not at all after a step that failed.

    Args:
        optimizer: over groups of ``lora_param_groups(..., units="start")``; before a learning rate scheduler is made.

    Returns:
        The same.

    Raises:
        TypeError: it is no optimizer.
        ValueError: no group has units, a scheduler was made already, or a step cannot do without a closure.
    """
    _checks.of_kind("in_units", optimizer, Optimizer, 'an optimizer over lora_param_groups(model, units="start")')
    if getattr(optimizer, "knows_units", False):
        return optimizer
    if not has_units(optimizer):
        raise ValueError('no group of the optimizer has unit_scales: give it lora_param_groups(model, units="start")')
    for group in optimizer.param_groups:
        if problem := problem_of_units(group, group):
            raise ValueError(problem)
    if "step" in vars(optimizer):
        raise ValueError("in_units: got an optimizer whose step was wrapped, must come before learning rate schedulers")
    cls: Any = type(optimizer)
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"in_units: {cls.__name__} evaluates the model within its step, which sees other parameters")
    optimizer.__class__ = _class_in_units(cls)
    optimizer._patch_step_function()
    return optimizer


@functools.cache
def _class_in_units(cls: Any) -> Any:
    members: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": cls.__module__, "knows_units": True}
    # without the step hooks that torch puts around it, so that they come outside and see the usual parameters
    members["step"] = _scaled_step(cls.step.__wrapped__)
    members |= {name: _scaled_switch(getattr(cls, name)) for name in _SWITCHES if hasattr(cls, name)}
    # no hook, which copies would not have
    members["load_state_dict"] = _checked_load(cls.load_state_dict)
    # it has the name of its base class, under which pickle would find that
    members["__reduce_ex__"] = lambda self, protocol: (_empty_in_units, (cls,), self.__getstate__())
    return type(cls.__name__, (cls,), members)


def _empty_in_units(cls: Any) -> Any:
    """What a copy begins with."""
    made = _class_in_units(cls)
    return made.__new__(made)


@contextmanager
def scaled_for_step(optimizer: Optimizer) -> Iterator[None]:
    """The parameters that have a gradient are in units in here, and so are the gradients, which go back with them.

    A factor without gradient is, too, where its partner has one, and comes back to the last bit.
    """
    scales = scales_of(optimizer)
    moving = {p: scale for p, scale in scales.items() if p.grad is not None}
    resting = {p: scales[p] for p in _partners(optimizer, moving) if p not in moving}
    gradients = [p.grad for p in moving if p.grad is not None]
    kept = [p.detach().clone() for p in resting]
    _multiply(gradients, moving.values())
    try:
        with _divided({**moving, **resting}):
            yield
    finally:
        _divide(gradients, moving.values())
        for p, value in zip(resting, kept, strict=True):
            p.detach().copy_(value)


def scales_of(optimizer: Any) -> dict[Tensor, float]:
    """The scale of every parameter that has units."""
    groups = [group for group in optimizer.param_groups if UNIT_SCALES in group]
    return {p: c for group in groups for p, c in zip(group["params"], group[UNIT_SCALES], strict=True)}


def grad_norm(parameters: Tensor | Iterable[Tensor], optimizer: Any) -> Tensor:
    """Norm ``()`` of all gradients together as an optimizer sees them: in its units, where it has any. With
    ``torch.nn.utils.clip_grads_with_norm_`` it clips them by a norm that does not depend on alpha and the start.

    Raises:
        TypeError: there is something else than tensors, or no optimizer (nor what has its ``param_groups``).
    """
    if not hasattr(optimizer, "param_groups"):
        _checks.of_kind("grad_norm: optimizer", optimizer, Optimizer, "the optimizer of these parameters")
    several = _checks.all_of_kind("grad_norm: parameters", parameters, Tensor, "tensors, as of model.parameters()")
    present = [p for p in several if p.grad is not None]
    gradients = [p.grad for p in present if p.grad is not None]
    scales = scales_of(optimizer)
    if not scales or not gradients:
        return get_total_norm(gradients)
    norms = torch._foreach_norm(gradients)
    torch._foreach_mul_(norms, [scales.get(p, 1.0) for p in present])
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def problem_of_units(group: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    """Why a saved group cannot be loaded into this one as far as units go, or None if it can."""
    if (UNIT_SCALES in saved) != (UNIT_SCALES in group):
        return f"it was written in {_name_of(saved)}, and this is in {_name_of(group)}"
    if UNIT_SCALES not in saved:
        return None
    scales = saved[UNIT_SCALES]
    fits = isinstance(scales, list | tuple) and len(scales) == len(group["params"])
    if not fits or not all(isinstance(c, float | int) and math.isfinite(c) and c > 0 for c in scales):
        return "its unit_scales are not one number above 0 for each parameter"
    return None


def _checked_load(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if problem := problem_of_units(group, saved):
                raise ValueError(f"this state does not belong to this {type(self).__name__}: {problem}")
        method(self, state_dict)

    return load_state_dict


def _scaled_step(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def step(self: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        loss = None
        if closure is not None:  # it has to find the usual parameters
            with torch.enable_grad():
                loss = closure()
        with scaled_for_step(self):
            returned = method(self, **kwargs)
        return returned if closure is None else loss

    return step


def _scaled_switch(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def switch(self: Any, *args: Any, **kwargs: Any) -> Any:
        # what has made no step has nothing to switch to
        with _divided({p: scale for p, scale in scales_of(self).items() if self.state.get(p)}):
            return method(self, *args, **kwargs)

    return switch


def _name_of(group: Mapping[str, Any]) -> str:
    return "units of the start" if UNIT_SCALES in group else "plain units"


def _partners(optimizer: Optimizer, params: Collection[Tensor]) -> Iterator[Tensor]:
    """The other factors of pairs, where the groups tell."""
    for group in optimizer.param_groups:
        if group.get("lora_pairs") and UNIT_SCALES in group:
            factors = group["params"]
            yield from (factors[i ^ 1] for i, p in enumerate(factors) if p in params)


@contextmanager
def _divided(scales: Mapping[Tensor, float]) -> Iterator[None]:
    _divide(list(scales), scales.values())
    try:
        yield
    finally:
        _multiply(list(scales), scales.values())


@torch.no_grad()
def _multiply(tensors: list[Tensor], scales: Iterable[float]) -> None:
    if tensors:
        torch._foreach_mul_(tensors, list(scales))


@torch.no_grad()
def _divide(tensors: list[Tensor], scales: Iterable[float]) -> None:
    """Not multiplied by reciprocals, whose rounding would add up, step by step, to a drift."""
    if tensors:
        torch._foreach_div_(tensors, list(scales))


def _power_of_two(number: float) -> float:
    return 2.0 ** round(math.log2(number))
