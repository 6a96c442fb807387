"""States that do not belong to an optimizer, for every file of the folder: refused, and nothing is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dreamlora import registry
from dreamlora.optimizers import lora_param_groups
from tests.optimizers.lora_problems import SHAPES, make_pairs, pair_group, quadratic_gradients, targets
from tests.optimizers.test_plugins import RATES, load

NAMES = registry.names("optimizers")
OURS = ("lora_muon", "lora_rite", "lora_tsd", "muon", "scaled_adamw", "scaled_gd")
every = pytest.mark.parametrize("name", NAMES)
WITH_STATE = {"sgd": {"momentum": 0.9}, "scaled_gd": {"momentum": 0.9}}
"""Settings of those that keep nothing by default."""
WIDER = tuple((m, n, r + 1) for m, n, r in SHAPES)


def stepped(name: str, shapes=SHAPES, steps: int = 2, names: tuple[str, ...] = tuple("abcd"), **settings):
    """An optimizer after some steps (on pairs, and a bias outside of them), and its parameters."""
    plugin = load(name)
    pairs = make_pairs(shapes, dtype=torch.float32)
    bias = nn.Parameter(torch.zeros(3))
    rest = {"params": [bias], "lora_pairs": False, "names": ["bias"], "lr": RATES.get(name, 2e-2)}
    groups = [pair_group(pairs, pair_names=list(names), lr=RATES.get(name, 2e-2), **settings), rest]
    optimizer = plugin.build(groups, plugin.Options(**WITH_STATE.get(name, {})))
    for _ in range(steps):
        step(pairs, bias, optimizer)
    return optimizer, pairs, bias


def step(pairs, bias, optimizer) -> None:
    quadratic_gradients(pairs, targets(pairs))
    bias.grad = torch.ones(3)
    optimizer.step()


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, tensors in it included."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def refuses(optimizer, state: Any, message: str) -> None:
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"does not belong to this {type(optimizer).__name__}: .*{message}"):
        optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), before)


@every
def test_a_state_of_its_own_is_taken_bit_for_bit(name):
    first, pairs, bias = stepped(name)
    second, others, other_bias = stepped(name, steps=0)
    with torch.no_grad():
        for p, q in zip([p for pair in others for p in pair], [p for pair in pairs for p in pair], strict=True):
            p.copy_(q)
        other_bias.copy_(bias)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, each, rest in ((first, pairs, bias), (second, others, other_bias)):
        step(each, rest, optimizer)
    assert all(torch.equal(p, q) for a, b in zip(pairs, others, strict=True) for p, q in zip(a, b, strict=True))
    assert torch.equal(bias, other_bias)
    assert same(first.state_dict(), second.state_dict())


@every
def test_a_state_of_an_earlier_version_is_taken_and_names_stay(name):
    first, _, _ = stepped(name)
    old = copy.deepcopy(first.state_dict())
    del old["written_by"]
    for group in old["param_groups"]:
        group.pop("names", None)
    second, _, _ = stepped(name, steps=0)
    second.load_state_dict(old)
    assert same(second.state_dict(), first.state_dict())


@every
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(("theirs", "mine"), [(SHAPES, WIDER), (WIDER, SHAPES)], ids=["up", "down"])
def test_a_state_of_another_rank(name, steps, theirs, mine):
    state = stepped(name, theirs)[0].state_dict()
    optimizer, _, _ = stepped(name, mine, steps)
    refuses(optimizer, state, r"of a\.lora_[AB] is .*another rank")


@every
@pytest.mark.parametrize("other", NAMES)
@pytest.mark.parametrize("signed", [True, False])
def test_a_state_of_another_class(name, other, signed):
    mine, theirs = stepped(name, steps=0)[0], stepped(other)[0]
    state = theirs.state_dict()
    if not signed:  # as earlier versions wrote them
        del state["written_by"]
        if name not in OURS and other not in OURS:
            pytest.skip("packages' own states tell less")
    if type(mine).__name__ != type(theirs).__name__:
        refuses(mine, state, type(theirs).__name__ if signed else "setting|group")


@every
def test_parameters_in_another_order(name):
    state = stepped(name, names=("a", "b", "c", "d"))[0].state_dict()
    optimizer, _, _ = stepped(name, names=("b", "a", "c", "d"), steps=0)
    refuses(optimizer, state, "for a.*b")
    renamed = [f"_orig_mod.{each}" for each in "abcd"]
    stepped(name, names=tuple(renamed), steps=0)[0].load_state_dict(state)  # as torch.compile names them


def truncated(state):
    state["state"] = dict(list(state["state"].items())[:3])


def with_an_entry_more(state):
    state["state"][99] = dict(state["state"][0])


def without_a_value(state):
    entry = dict(state["state"][0])
    entry.popitem()
    state["state"][0] = entry if entry else {"other": torch.zeros(())}


def without_a_group(state):
    state["param_groups"].pop()


def without_a_parameter(state):
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]


def without_groups(state):
    del state["param_groups"]


def with_nan(state):
    for entry in state["state"].values():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.dim():
                entry[key] = torch.full_like(value, float("nan"))
                return


def without_a_rate(state):
    del state["param_groups"][0]["lr"]


def with_a_word_for_a_rate(state):
    state["param_groups"][0]["lr"] = "fast"


@every
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "parameters"),
        (with_an_entry_more, "99"),
        (without_a_value, "lacks|has"),
        (without_a_group, "group"),
        (without_a_parameter, "parameters"),
        (without_groups, "param_groups"),
        (with_nan, "not finite"),
        (without_a_rate, "lr"),
        (with_a_word_for_a_rate, "lr"),
    ],
)
def test_a_state_that_is_damaged(name, damage, message):
    source = stepped(name)[0]
    state = copy.deepcopy(source.state_dict())
    if not state["state"].get(0):
        pytest.skip("keeps no state")
    damage(state)
    optimizer, _, _ = stepped(name, steps=0)
    refuses(optimizer, state, message)


@pytest.mark.parametrize("state", [[], {}, {"state": {}}])
@every
def test_what_is_no_state(name, state):
    refuses(stepped(name, steps=0)[0], state, "param_groups")


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_settings_out_of_range_are_refused_before_they_are_loaded(name, value):
    state = copy.deepcopy(stepped(name)[0].state_dict())
    state["param_groups"][0]["lr"] = value
    refuses(stepped(name, steps=0)[0], state, "lr: got")


@pytest.mark.parametrize("name", OURS)
def test_a_state_of_another_alpha(name):
    state = stepped(name, scalings=[2.0] * 4)[0].state_dict()
    refuses(stepped(name, steps=0, scalings=[1.0] * 4)[0], state, "alpha")


@every
def test_parameters_without_gradient_have_no_state_and_that_is_taken(name):
    source, pairs, _ = stepped(name, steps=0)
    quadratic_gradients(pairs, targets(pairs))
    for factor in pairs[1]:
        factor.grad = None
    source.step()
    second, _, _ = stepped(name, steps=0)
    second.load_state_dict(source.state_dict())
    assert same(second.state_dict(), source.state_dict())


def test_names_of_what_is_in_no_pair_are_kept():
    lora = {"down": nn.Linear(4, 2, bias=False), "up": nn.Linear(2, 4, bias=False)}
    net = nn.ModuleDict({"lora": nn.ModuleDict(lora), "norm": nn.LayerNorm(4)})
    assert lora_param_groups(net)[1]["names"] == ["norm.weight", "norm.bias"]
