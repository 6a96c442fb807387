"""The plug-in contract, for every file of the folder."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from lora_problems import SHAPES, make_pairs, pair_group, quadratic_gradients, targets
from torch import nn

from dreamlora import optimizers, registry

NAMES = registry.names("optimizers")
every = pytest.mark.parametrize("name", NAMES)


def groups_and_pairs(dtype=torch.float32, **settings):
    pairs = make_pairs(dtype=dtype)
    bias = nn.Parameter(torch.zeros(3, dtype=dtype))
    bias.grad = torch.ones(3, dtype=dtype)
    return [pair_group(pairs, **settings), {"params": [bias], "lora_pairs": False, **settings}], pairs, bias


def distance(pairs) -> float:
    return sum(float((B @ A - W).detach().square().sum()) for (A, B), W in zip(pairs, targets(pairs), strict=True))


def test_the_folder_holds_the_promised_optimizers():
    assert {"adamw", "sgd", "scaled_gd", "scaled_adamw"} <= set(NAMES)


def test_plugins_import_without_torch():
    code = f"""
import importlib, sys
for name in {NAMES}:
    importlib.import_module("dreamlora.optimizers." + name).Options()
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@every
def test_options_are_frozen_documented_and_of_defaults_in_range(name):
    Options = registry.load("optimizers", name).Options
    options = Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, dataclasses.fields(options)[0].name, None)
    source = open(registry.load("optimizers", name).__file__).read().splitlines()  # noqa: PTH123, SIM115
    for field in dataclasses.fields(options):
        line = next(i for i, text in enumerate(source) if text.strip().startswith(f"{field.name}:"))
        assert source[line + 1].strip().startswith('"""'), field.name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("adamw", {"betas": (0.9, 1.0)}),
        ("adamw", {"eps": -1.0}),
        ("sgd", {"momentum": 1.0}),
        ("sgd", {"nesterov": True}),
        ("scaled_gd", {"damping": -1.0}),
        ("scaled_gd", {"fallback_lr": float("nan")}),
        ("scaled_adamw", {"damping_mode": "other"}),
        ("scaled_adamw", {"damping": float("inf")}),
    ],
)
def test_options_out_of_range_are_named(name, values):
    (field, value), *_ = values.items()
    with pytest.raises(ValueError, match=rf"{field}: got .*must"):
        registry.load("optimizers", name).Options(**{field: value})


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_approaches_the_target_and_moves_everything(name, dtype):
    plugin = registry.load("optimizers", name)
    groups, pairs, bias = groups_and_pairs(dtype, lr=2e-2, weight_decay=0.0)
    optimizer = plugin.build(groups, plugin.Options())
    before = distance(pairs)
    for _ in range(15):
        quadratic_gradients(pairs, targets(pairs))
        optimizer.step()
    assert distance(pairs) < 0.8 * before
    assert not torch.equal(bias, torch.zeros_like(bias))


@every
def test_groups_without_a_rate_get_the_default_one(name):
    plugin = registry.load("optimizers", name)
    groups, _, _ = groups_and_pairs()
    assert plugin.build(groups, plugin.Options()).param_groups[0]["lr"] == plugin.DEFAULT_LR > 0


@every
def test_lora_plus_and_weight_decay_arrive(name):
    plugin = registry.load("optimizers", name)
    steps = []
    for settings in ({}, {"lr_ratio_B": 3.0}, {"weight_decay": 0.5}):
        groups, pairs, _ = groups_and_pairs(torch.float64, **{"lr": 1e-2, "weight_decay": 0.0, **settings})
        before = [p.detach().clone() for pair in pairs for p in pair]
        quadratic_gradients(pairs, targets(pairs))
        plugin.build(groups, plugin.Options()).step()
        steps.append([p.detach() - q for p, q in zip(groups[0]["params"], before, strict=True)])
    plain, ratio, decayed = steps
    for i in range(2 * len(SHAPES)):
        torch.testing.assert_close(ratio[i], plain[i] * (3.0 if i % 2 else 1.0))
        assert not torch.allclose(decayed[i], plain[i])


def test_scaled_gd_gives_the_fallback_its_own_rate():
    plugin = registry.load("optimizers", "scaled_gd")
    groups, _, _ = groups_and_pairs(lr=1.0)
    assert [g["lr"] for g in plugin.build(groups, plugin.Options(fallback_lr=1e-5)).param_groups] == [1.0, 1e-5]


def test_the_package_names_what_it_exports():
    assert all(hasattr(optimizers, name) for name in optimizers.__all__)
    with pytest.raises(AttributeError):
        _ = optimizers.nothing
