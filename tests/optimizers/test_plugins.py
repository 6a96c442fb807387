"""The plug-in contract, for every file of the folder."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

from dreamlora import optimizers, registry
from dreamlora.errors import UserError
from tests.optimizers.lora_problems import SHAPES, make_pairs, pair_group, quadratic_gradients, targets

NAMES = registry.names("optimizers")
every = pytest.mark.parametrize("name", NAMES)


def groups_and_pairs(dtype=torch.float32, **settings):
    pairs = make_pairs(dtype=dtype)
    bias = nn.Parameter(torch.zeros(3, dtype=dtype))
    bias.grad = torch.ones(3, dtype=dtype)
    return [pair_group(pairs, **settings), {"params": [bias], "lora_pairs": False, **settings}], pairs, bias


def distance(pairs) -> float:
    return sum(float((B @ A - W).detach().square().sum()) for (A, B), W in zip(pairs, targets(pairs), strict=True))


PROMISED = {
    "adamw",
    "sgd",
    "scaled_gd",
    "scaled_adamw",
    "lora_rite",
    "lora_muon",
    "lora_tsd",
    "muon",
    "lora_plus",
    "adafactor",
}
PROMISED |= {"adamw8bit", "prodigy", "schedulefree_adamw", "lion", "came", "peft_riemannian"}
RATES = {"lora_muon": 0.2, "lora_tsd": 0.2, "muon": 0.1, "lora_plus": 5e-3, "adafactor": 0.1, "prodigy": 1.0}
"""For the quadratic; others take 2e-2."""


def load(name):
    """The plug-in; a test of one whose package is missing is skipped."""
    try:
        registry.check_needs("optimizers", name)
    except UserError as error:
        pytest.skip(str(error))
    return registry.load("optimizers", name)


def test_the_folder_holds_the_promised_optimizers():
    assert set(NAMES) >= PROMISED


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
    for field in dataclasses.fields(options):
        owner = next(cls for cls in Options.__mro__ if field.name in vars(cls).get("__annotations__", {}))
        source = inspect.getsource(owner).splitlines()
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
        ("lora_rite", {"update_capping": -1.0}),
        ("lora_rite", {"fallback_lr": -1.0}),
        ("lora_muon", {"damping": -1.0}),
        ("lora_tsd", {"projections": 0}),
        ("muon", {"ns_steps": 0}),
        ("muon", {"adjust_lr_fn": "none"}),
        ("lora_plus", {"ratio": 0.0}),
        ("adafactor", {"beta2_decay": 0.8}),
        ("adamw8bit", {"library": "other"}),
        ("prodigy", {"d0": 0.0}),
        ("prodigy", {"growth_rate": 1.0}),
        ("schedulefree_adamw", {"warmup_steps": -1}),
        ("came", {"beta3": 1.0}),
        ("lion", {"betas": (1.0, 0.9)}),
        ("peft_riemannian", {"reg": -1.0}),
    ],
)
def test_options_out_of_range_are_named(name, values):
    (field, value), *_ = values.items()
    with pytest.raises(ValueError, match=rf"{field}: got .*must"):
        registry.load("optimizers", name).Options(**{field: value})


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_approaches_the_target_and_moves_everything(name, dtype):
    plugin = load(name)
    groups, pairs, bias = groups_and_pairs(dtype, lr=RATES.get(name, 2e-2), weight_decay=0.0)
    options = {"d0": 1e-2} if name == "prodigy" else {}
    optimizer = plugin.build(groups, plugin.Options(**options))
    before = distance(pairs)
    for _ in range(15):
        quadratic_gradients(pairs, targets(pairs))
        optimizer.step()
    assert distance(pairs) < 0.8 * before
    assert not torch.equal(bias, torch.zeros_like(bias))


@every
def test_groups_without_a_rate_get_the_default_one(name):
    plugin = load(name)
    groups, _, _ = groups_and_pairs()
    assert plugin.build(groups, plugin.Options()).param_groups[0]["lr"] == plugin.DEFAULT_LR > 0


@every
def test_lora_plus_and_weight_decay_arrive(name):
    plugin = load(name)
    steps = []
    if name == "prodigy":
        with pytest.raises(UserError, match=r"finds one learning rate .*LoRA\+"):
            plugin.build(groups_and_pairs(lr=1.0, lr_ratio_B=3.0)[0], plugin.Options())
        return
    for settings in ({}, {"lr_ratio_B": 3.0}, {"weight_decay": 0.5}):
        groups, pairs, _ = groups_and_pairs(torch.float64, **{"lr": 1e-2, "weight_decay": 0.0, **settings})
        before = [p.detach().clone() for pair in pairs for p in pair]
        quadratic_gradients(pairs, targets(pairs))
        plugin.build(groups, plugin.Options()).step()
        steps.append([p.detach() - q for p, q in zip(groups[0]["params"], before, strict=True)])
    plain, ratio, decayed = steps
    for i in range(2 * len(SHAPES)):
        tolerance = {"rtol": 1e-4, "atol": 1e-7} if name == "adamw8bit" else {}  # it computes in float32
        torch.testing.assert_close(ratio[i], plain[i] * (3.0 if i % 2 else 1.0), **tolerance)
        assert not torch.allclose(decayed[i], plain[i])


def test_scaled_gd_gives_the_fallback_its_own_rate():
    plugin = registry.load("optimizers", "scaled_gd")
    groups, _, _ = groups_and_pairs(lr=1.0)
    assert [g["lr"] for g in plugin.build(groups, plugin.Options(fallback_lr=1e-5)).param_groups] == [1.0, 1e-5]


def test_the_package_names_what_it_exports():
    assert all(hasattr(optimizers, name) for name in optimizers.__all__)
    with pytest.raises(AttributeError):
        _ = optimizers.nothing


@pytest.mark.parametrize("name", ["lora_rite", "lora_muon", "lora_tsd"])
def test_methods_with_other_units_give_the_fallback_its_own_rate(name):
    plugin = registry.load("optimizers", name)
    groups, _, _ = groups_and_pairs(lr=1.0)
    assert [g["lr"] for g in plugin.build(groups, plugin.Options(fallback_lr=1e-5)).param_groups] == [1.0, 1e-5]


def test_lora_plus_is_adamw_with_two_rates():
    plugin = registry.load("optimizers", "lora_plus")
    groups, pairs, bias = groups_and_pairs(lr=1e-2, weight_decay=0.1)
    _, others, other_bias = groups_and_pairs()
    common = {"weight_decay": 0.1, "fused": True}
    optimizer = plugin.build(groups, plugin.Options(ratio=4.0))
    reference = torch.optim.AdamW(
        [{"params": [A for A, _ in others]}, {"params": [B for _, B in others], "lr": 4e-2}, {"params": [other_bias]}],
        lr=1e-2,
        **common,
    )
    for _ in range(3):
        for each, step in ((pairs, optimizer), (others, reference)):
            quadratic_gradients(each, targets(each))
            step.step()
    assert all(torch.equal(x, y) for a, b in zip(pairs, others, strict=True) for x, y in zip(a, b, strict=True))
    assert torch.equal(bias, other_bias)


def test_muon_is_torchs_and_takes_kernels():
    plugin = registry.load("optimizers", "muon")
    groups, pairs, _ = groups_and_pairs(lr=1e-2, weight_decay=0.1)
    others = make_pairs(dtype=torch.float32)
    conv = [
        (
            nn.Parameter(A.detach().view(3, -1, 1, 1).contiguous(memory_format=torch.channels_last)),
            nn.Parameter(B.detach().clone()[..., None, None]),
        )
        for A, B in make_pairs(dtype=torch.float32)[:3]
    ]
    reference = torch.optim.Muon(
        [p for pair in others for p in pair], lr=1e-2, weight_decay=0.1, **{"adjust_lr_fn": "match_rms_adamw"}
    )
    optimizer = plugin.build(groups, plugin.Options())
    convolution = plugin.build([pair_group(conv, lr=1e-2, weight_decay=0.1)], plugin.Options())
    for _ in range(3):
        for each, step in ((pairs, optimizer), (others, reference)):
            quadratic_gradients(each, targets(each))
            step.step()
        for (a, b), (A, B) in zip(conv, pairs, strict=False):
            a.grad, b.grad = A.grad.view(a.shape), B.grad.view(b.shape)
        convolution.step()
    for i, (A, B) in enumerate(pairs):
        assert torch.equal(A, others[i][0]) and torch.equal(B, others[i][1])
    for (a, b), (A, B) in zip(conv, pairs, strict=False):
        assert torch.equal(a.flatten(1), A) and torch.equal(b.flatten(1), B)


def test_peft_riemannian_preconditions_matrices_and_says_what_it_passes_over(caplog):
    pytest.importorskip("peft")
    plugin = registry.load("optimizers", "peft_riemannian")
    pairs = make_pairs(((4, 5, 2),), dtype=torch.float32)
    conv = (nn.Parameter(torch.ones(2, 3, 3, 3)), nn.Parameter(torch.ones(4, 2, 1, 1)))
    group = pair_group([*pairs, conv], lr=1e-2, weight_decay=0.0)
    quadratic_gradients(pairs, targets(pairs))
    conv[0].grad, conv[1].grad = torch.ones_like(conv[0]), torch.ones_like(conv[1])
    (A, B), gA = pairs[0], pairs[0][0].grad.clone()
    wanted = torch.linalg.inv(B.detach().T @ B.detach() + 0.5 * torch.eye(2)) @ gA
    optimizer = plugin.build([group], plugin.Options(reg=0.5))
    optimizer.step()
    torch.testing.assert_close(A.grad, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(conv[0].grad, torch.ones_like(conv[0])) and not torch.equal(conv[0], torch.ones_like(conv[0]))
    assert "1 of 2 LoRA pairs are trained by plain AdamW" in caplog.text
    assert optimizer.param_groups[0]["lr"] == 1e-2
    with pytest.raises(UserError, match="linear layers only"):
        plugin.build([pair_group([conv])], plugin.Options())


def test_schedule_free_is_built_ready_to_step_and_averages():
    plugin = load("schedulefree_adamw")
    pairs = make_pairs(dtype=torch.float32)
    optimizer = plugin.build([pair_group(pairs, lr=0.05)], plugin.Options())
    for _ in range(4):
        quadratic_gradients(pairs, targets(pairs))
        optimizer.step()
    trained = [p.detach().clone() for pair in pairs for p in pair]
    optimizer.eval()
    assert not any(torch.equal(p, q) for p, q in zip([p for pair in pairs for p in pair], trained, strict=True))
    optimizer.train()
    for p, q in zip([p for pair in pairs for p in pair], trained, strict=True):
        torch.testing.assert_close(p.detach(), q)


@every
def test_what_has_no_gradient_neither_moves_nor_decays(name):
    plugin = load(name)
    groups, pairs, _ = groups_and_pairs(lr=RATES.get(name, 2e-2), weight_decay=0.5)
    optimizer = plugin.build(groups, plugin.Options())
    before = [factor.detach().clone() for factor in pairs[0]]
    for _ in range(2):
        quadratic_gradients(pairs, targets(pairs))
        for factor in pairs[0]:
            factor.grad = None
        optimizer.step()
    assert all(map(torch.equal, before, pairs[0]))
