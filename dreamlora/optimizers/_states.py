"""States of optimizers: who wrote one is noted in it, and one that belongs to another optimizer is not loaded.

torch compares the number of groups and of parameters, no more: a state of another rank ends in a kernel that reads past
its end, one of the same shapes trains on with the wrong moments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreamlora.optimizers._groups import names_of
from dreamlora.optimizers._units import problem_of_units

State = dict[str, Any]

WRITTEN_BY = "written_by"
_OF_THE_MODEL = ("names", "pair_names", "scalings")
"""Keys of a group that say what its parameters are: loading a state leaves them alone."""
_OF_SCHEDULES = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_WRAPPER = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|module)\.")


def guarded(optimizer: Optimizer) -> Optimizer:
    """An optimizer of another package that from now on signs its states, and refuses those of others."""
    optimizer.register_state_dict_post_hook(sign)
    optimizer.register_load_state_dict_pre_hook(own_state)
    return optimizer


def sign(optimizer: Optimizer, state_dict: State) -> None:
    """Note the class and the number of parameters that have a state."""
    entries = sum(map(bool, state_dict["state"].values()))
    state_dict[WRITTEN_BY] = {"class": type(optimizer).__name__, "entries": entries}


def own_state(optimizer: Optimizer, state_dict: State) -> State:
    """``state_dict`` as it may be loaded: with what the groups say of the model as it is now.

    Raises:
        ValueError: it was written by another class, for other parameters or shapes, or is damaged; the message says
            where. The optimizer is as it was.
    """
    problem = next(_problems(optimizer, state_dict), None)
    if problem:
        raise ValueError(
            f"this state does not belong to this {type(optimizer).__name__}: {problem}. A state can only be loaded for "
            "the model, the rank and the optimizer that it was written with"
        )
    groups = [
        {**_completed(optimizer, saved), **{key: group[key] for key in _OF_THE_MODEL if key in group}}
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    return {**state_dict, "param_groups": groups}


def _completed(optimizer: Optimizer, saved: State) -> State:
    """A saved group with the settings that were added since it was written."""
    added_settings = getattr(optimizer, "added_settings", None)
    return {**added_settings(saved), **saved} if added_settings else saved


def _problems(optimizer: Optimizer, state_dict: Any) -> Iterator[str]:
    """What is wrong with a state, worst first; what comes later may take for granted that nothing came before."""
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
        yield "it has no 'state' and 'param_groups', as the state_dict() of an optimizer has"
    written_by = state_dict.get(WRITTEN_BY)
    if written_by and written_by["class"] != type(optimizer).__name__:
        yield f"{written_by['class']} has written it"
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(optimizer.param_groups):
        yield f"it has {len(saved_groups)} groups of parameters, and not {len(optimizer.param_groups)}"
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        yield from _problems_of_parameters(group, saved)
        yield from _problems_of_settings(optimizer, group, saved, bool(written_by))
    ids = {i for saved in saved_groups for i in saved["params"]}
    if strangers := [str(i) for i in state_dict["state"] if i not in ids]:
        yield f"it has values for {', '.join(strangers)}, which is no parameter of its groups"
    entries = sum(map(bool, state_dict["state"].values()))
    if written_by and written_by["entries"] != entries:
        yield f"it has values for {entries} parameters of the {written_by['entries']} that it was written with"
    packaged = not hasattr(optimizer, "state_shapes")
    # twice: prodigyopt keeps less of parameters that are zero
    models = [_after_a_step(optimizer, value) for value in (0.0, 1.0)] if packaged and entries else []
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        yield from _problems_of_values(optimizer, group, saved, state_dict["state"], models)


def _problems_of_parameters(group: State, saved: State) -> Iterator[str]:
    if len(saved.get("params", ())) != len(group["params"]):
        yield f"a group has {len(saved.get('params', ()))} parameters, and not {len(group['params'])}"
    if saved.get("lora_pairs") != group.get("lora_pairs"):
        yield "a group of LoRA pairs stands where other parameters stand, or the other way round"
    for one, other in zip(names_of(saved), names_of(group), strict=False):
        if _WRAPPER.sub("", one) != _WRAPPER.sub("", other):
            yield f"it has values for {one} where {other} stands (another model, or another order)"
    if saved.get("scalings") and group.get("scalings") and list(saved["scalings"]) != list(group["scalings"]):
        yield "it was written with another alpha / rank"
    if problem := problem_of_units(group, saved):
        yield problem


def _problems_of_settings(optimizer: Optimizer, group: State, saved: State, signed: bool) -> Iterator[str]:
    validate = getattr(optimizer, "validate_group", None)
    saved = _completed(optimizer, saved)
    # Other packages' flags come and go with their versions; they fill in what is missing.
    needed = {name for name, value in optimizer.defaults.items() if validate or not isinstance(value, bool | None)}
    if missing := sorted(needed & group.keys() - saved.keys()):
        yield f"it lacks the settings {', '.join(missing)} (another optimizer, or an older version)"
    unknown = sorted(saved.keys() - group.keys() - _OF_SCHEDULES - {*_OF_THE_MODEL})
    if validate and unknown and not signed:
        yield f"it has the settings {', '.join(unknown)}, which are not known here (another optimizer)"
    for name in sorted(group.keys() & saved.keys() - {"params", *_OF_THE_MODEL}):
        if problem := _problem_of_setting(group[name], saved[name]):
            yield f"its {name}: {problem}"
    if validate:
        try:
            validate({**group, **saved})
        except ValueError as error:
            yield str(error)


def _problem_of_setting(now: Any, saved: Any) -> str | None:
    """What is wrong with a setting, beside that of this optimizer: of another kind, or no number that can be meant."""
    if isinstance(now, bool | None) and not isinstance(saved, bool | None | int | float):
        return f"is {saved!r}, and not {now!r}"
    if isinstance(now, tuple | list):
        alike = isinstance(saved, tuple | list) and len(saved) == len(now)
        alike = alike and not any(map(_problem_of_setting, now, saved))
        return None if alike else f"is {saved!r}, and not like {now!r}"
    if isinstance(now, str):
        return None if isinstance(saved, str) else f"is no word ({saved!r})"
    if not isinstance(now, bool) and _is_number(now):
        if not _is_number(saved) or isinstance(saved, bool):
            return f"is no number ({saved!r})"
        if math.isfinite(now) and not math.isfinite(saved):
            return f"got {float(saved)}, which is no number"
    return None


def _problems_of_values(
    optimizer: Optimizer, group: State, saved: State, state: State, models: Sequence[Mapping[Tensor, State]]
) -> Iterator[str]:
    shapes_of = getattr(optimizer, "state_shapes", None)
    for index, (p, i) in enumerate(zip(group["params"], saved["params"], strict=True)):
        values = state.get(i)
        if not values:  # it never had a gradient
            continue
        where = _name(group, index)
        shapes: Mapping[str, tuple[int, ...]] = shapes_of(group, index) if shapes_of else {}
        like = [model[p] for model in models if p in model]
        known = set(shapes) or set().union(*like)
        if values.keys() != known:
            yield f"of {where} it has {', '.join(sorted(values))}, and not {', '.join(sorted(known))}"
        for key, value in values.items():
            if shapes:
                problem = _problem_of_moment(value, shapes[key])
            else:
                problem = _problem_of_value(value, [model[key] for model in like])
            if problem:
                yield f"{key} of {where} {problem}"


def _problem_of_moment(value: Any, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that must have this shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return f"is of {value.dtype if isinstance(value, Tensor) else type(value).__name__}, which holds no moments"
    return _problem_of_tensor(value, [tuple(value.shape) == shape], shape)


def _problem_of_value(value: Any, like: Sequence[Any]) -> str | None:
    """What is wrong with one value, beside those that this optimizer would have."""
    if not isinstance(value, Tensor):
        alike = any(type(value) is type(one) or (_is_number(value) and _is_number(one)) for one in like)
        return None if alike else f"is a {type(value).__name__}"
    tensors = [one for one in like if isinstance(one, Tensor)]
    if not tensors:
        return None if value.numel() == 1 and any(map(_is_number, like)) else f"is a tensor of {tuple(value.shape)}"
    if value.dtype not in {one.dtype for one in tensors}:
        return f"is of {value.dtype}, and not of {tensors[0].dtype}"
    return _problem_of_tensor(value, [value.shape == one.shape for one in tensors], tuple(tensors[-1].shape))


def _problem_of_tensor(value: Tensor, fits: Sequence[bool], shape: tuple[int, ...]) -> str | None:
    if not any(fits):
        return f"is {tuple(value.shape)}, and not {shape} (another rank?)"
    plain = type(value) is Tensor and value.is_floating_point()  # not the quantised tensors of some packages
    return "is not finite" if plain and not bool(value.isfinite().all()) else None


@torch.no_grad()
def _after_a_step(optimizer: Optimizer, value: float) -> dict[Tensor, State]:
    """What an optimizer of another package keeps of its parameters after a first step, which is undone.

    Args:
        value: of all parameters; their gradients are zero.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    before = [(p.detach().clone(), p.grad) for p in parameters]
    state = dict(optimizer.state)
    optimizer.state.clear()
    try:
        if hasattr(optimizer, "train"):
            optimizer.train()
        for p in parameters:
            p.fill_(value)
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return dict(optimizer.state)
    finally:
        for p, (data, grad) in zip(parameters, before, strict=True):
            p.copy_(data)
            p.grad = grad
        for group, as_it_was in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(as_it_was)
        optimizer.state.clear()
        optimizer.state.update(state)


def _name(group: State, index: int) -> str:
    """What a parameter is called in a message."""
    names = names_of(group)
    return names[index] if names else f"a parameter of shape {tuple(group['params'][index].shape)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
