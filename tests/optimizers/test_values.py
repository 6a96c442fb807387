"""Values out of range: refused of every class and every argument, wherever they stand; of every plug-in's options."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dreamlora import optimizers, registry
from dreamlora.optimizers import LoRAMuon, LoraPairOptimizer, LoRARITE, ScaledAdamW, ScaledGD
from tests.optimizers.lora_problems import make_pairs, pair_group

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = (NAN, "a", None, (0.5,))
BAD = {
    bool: ("yes", None, NAN, 2),
    int: (-1, 1.5, INF, *NO_NUMBERS),
    float: (-1.0, -INF, *NO_NUMBERS),
    str: ("other", None, 1),
    tuple: ((0.9,), (0.9, 1.0), (NAN, 0.9), (0.9, -0.1), (0.9, 0.9, 0.9), ("a", 0.9), 0.9, "ab", None),
}
"""By the type of the argument."""
MORE = {"momentum": (1.0, INF), "ns_steps": (0, 100), "lr": (torch.tensor(-1.0), torch.tensor(NAN), torch.ones(2))}
UNBOUNDED = {"growth_rate"}
SIGNED = {"beta2_decay"}


def classes() -> list[type[LoraPairOptimizer]]:
    """All optimizers over pairs of this package that can be constructed."""
    modules = [info.name for info in pkgutil.iter_modules(optimizers.__path__, f"{optimizers.__name__}.")]
    found = {
        cls
        for name in modules
        for cls in vars(importlib.import_module(name)).values()
        if isinstance(cls, type) and issubclass(cls, LoraPairOptimizer)
    }
    return sorted((cls for cls in found if "lr" in inspect.signature(cls).parameters), key=lambda cls: cls.__name__)


def bad_values(name: str, kind: type) -> list[object]:
    finite = () if kind is not float or name in UNBOUNDED else (INF,)
    values = [value for value in BAD[kind] if not (name in SIGNED and value == -1.0)]
    return [*values, *finite, *MORE.get(name, ())]


ARGUMENTS = [
    pytest.param(cls, parameter.name, parameter.default, id=f"{cls.__name__}-{parameter.name}")
    for cls in classes()
    for parameter in inspect.signature(cls).parameters.values()
    if parameter.name != "params"
]


def test_every_class_is_among_them():
    assert {ScaledAdamW, ScaledGD, LoRAMuon, LoRARITE} < set(classes())
    assert "FactorMuon" in {cls.__name__ for cls in classes()}


def other_group(**settings) -> dict:
    return {"params": [nn.Parameter(torch.zeros(3))], "lora_pairs": False, **settings}


def refused(name: str, make: Callable[[], object]) -> bool:
    """Whether this is a ValueError that names the argument and says what it must be."""
    try:
        make()
    except ValueError as error:
        return bool(re.search(rf"\b{name}: got .*must", str(error)))
    except Exception:
        return False
    return False


@pytest.mark.parametrize(("cls", "name", "good"), ARGUMENTS)
def test_a_bad_value_is_named_wherever_it_stands(cls, name, good):
    pairs = make_pairs()
    optimizer = cls([pair_group(make_pairs())])
    places = {
        "default": lambda bad: cls([pair_group(pairs)], **{name: bad}),
        "overridden": lambda bad: cls([pair_group(pairs, **{name: good}), other_group(**{name: good})], **{name: bad}),
        "group": lambda bad: cls([pair_group(pairs, **{name: bad})]),
        "other group": lambda bad: cls([pair_group(pairs), other_group(**{name: bad})]),
        "added": lambda bad: optimizer.add_param_group(pair_group(pairs, **{name: bad})),
    }
    cases = [(place, bad) for place in places for bad in bad_values(name, type(good))]
    assert [(place, bad) for place, bad in cases if not refused(name, lambda: places[place](bad))] == []  # noqa: B023
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", classes())
@pytest.mark.parametrize(
    ("name", "bad"),
    [("lr_ratio_B", bad) for bad in (0.0, -1.0, NAN, INF, "a", None)]
    + [("scalings", [1.0, bad, 1.0, 1.0]) for bad in (NAN, INF, "a", None)]
    + [("scalings", 0.5), ("differentiable", True), ("differentiable", "no")],
)
def test_so_are_those_that_groups_alone_have(cls, name, bad):
    with pytest.raises(ValueError, match=rf"^{name}: got .*must"):
        cls([pair_group(make_pairs(), **{name: bad})])


@pytest.mark.parametrize("cls", classes())
def test_what_torch_takes_is_taken(cls):
    for settings in ({"lr": 0.0}, {"lr": torch.tensor(0.1)}, {"betas": [0.0, 0.5]}, {"eps": 0.0}, {"maximize": True}):
        pairs = make_pairs()
        cls([pair_group(pairs)], **settings)
        cls([pair_group(pairs, **settings), other_group(**settings)])


@pytest.mark.parametrize("plugin", registry.names("optimizers"))
def test_bad_options_of_plugins_are_named(plugin):
    Options = registry.load("optimizers", plugin).Options
    cases = [(f.name, bad) for f in dataclasses.fields(Options) for bad in bad_values(f.name, type(f.default))]
    assert [(name, bad) for name, bad in cases if not refused(name, lambda: Options(**{name: bad}))] == []  # noqa: B023


WRONG = {
    "a model": nn.Sequential(nn.Linear(2, 2)),
    "another": nn.Linear(2, 2),
    "nothing": None,
    "a number": 3,
    "parameters": [nn.Parameter(torch.zeros(2, 2))],
    "groups": [{"params": [nn.Parameter(torch.zeros(2, 2))]}],
    "a text": "unet",
    "an optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0),
}


def takers() -> dict[str, tuple[Callable[[object], object], set[str]]]:
    """Public functions, by what is said of a wrong argument, and the right ones among ``WRONG``."""
    optimizer, models = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0), {"a model", "another"}
    modules = ("lora_param_groups", "group_without_pairs", "find_lora_pairs", "check_compatibility")
    found = {f"{name}: got": (getattr(optimizers, name), models) for name in modules}
    found["in_units: got"] = (optimizers.in_units, {"an optimizer"})
    found["grad_norm: parameters: got"] = (lambda wrong: optimizers.grad_norm(wrong, optimizer), {"parameters"})
    found["grad_norm: optimizer: got"] = (lambda wrong: optimizers.grad_norm([], wrong), {"an optimizer"})
    listed = {"a model", "parameters", "groups", "a text"}  # of what can be gone through, the pairs are asked for
    found |= {f"{cls.__name__}: got": (lambda wrong, cls=cls: cls(wrong, lr=1.0), listed) for cls in classes()}
    return found


@pytest.mark.parametrize("told", takers())
def test_wrong_types_are_told_by_every_public_function(told: str) -> None:
    take, right = takers()[told]
    for wrong in WRONG.keys() - right:
        with pytest.raises(TypeError, match=rf"^{told} .*{type(WRONG[wrong]).__name__}.*, must be ") as caught:
            take(WRONG[wrong])
        assert "\n" not in str(caught.value)


def test_several_modules_may_come_one_by_one() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    assert len(optimizers.group_without_pairs(iter(layers))[0]["params"]) == 4
    layers[0].weight.grad = torch.full((2, 2), 2.0)
    optimizer = torch.optim.SGD(layers[0].parameters(), lr=1.0)
    assert optimizers.grad_norm(layers[0].weight, optimizer) == 4.0
    assert optimizers.grad_norm(layers[0].parameters(), optimizer) == 4.0
