"""LoRA layers that look like a pair and are none, and pairs that other libraries keep under other names."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora import config as lora_config
from torch import nn

from dreamlora.optimizers import ScaledAdamW, check_compatibility, find_lora_pairs, lora_param_groups


class Experts(nn.Module):
    """Three experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight).mean(1)


class Block(nn.Module):
    """Experts beside two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate, self.up = Experts(), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x) + self.gate(x) * self.up(x)


VARIANTS = {
    "experts": (
        "every expert has factors",
        lambda: {"target_modules": ["up"], "target_parameters": ["experts.weight"]},
    ),
    "block-diagonal A": (
        "block-diagonal",
        lambda: {
            "target_modules": ["gate", "up"],
            "use_bdlora": lora_config.BdLoraConfig(target_modules_bd_a=["gate"], nblocks=2, match_strict=False),
        },
    ),
    "block-diagonal B": (
        "do not multiply",
        lambda: {
            "target_modules": ["gate", "up"],
            "use_bdlora": lora_config.BdLoraConfig(target_modules_bd_b=["gate"], nblocks=2, match_strict=False),
        },
    ),
}


def adapted(**settings) -> Block:
    """With LoRA, both factors other than zero."""
    torch.manual_seed(0)
    block = peft.inject_adapter_in_model(peft.LoraConfig(r=2, **settings), Block())
    with torch.no_grad():
        for name, p in block.named_parameters():
            if ".lora_" in name:
                p.normal_()
    return block


def backward(model: nn.Module) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    (model(x) - 1).square().mean().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_keeps_the_names_of_a_pair_and_is_none_trains_by_adamw(variant, caplog):
    said, settings = VARIANTS[variant]
    block = adapted(**settings())
    backward(block)
    groups = lora_param_groups(block)
    assert groups[0]["pair_names"] == ["up"] and len(groups[1]["params"]) == 2
    assert "1 LoRA layers are trained without preconditioning" in caplog.text and said in caplog.text
    assert max(check_compatibility(block).values()) < 1e-5
    before = [p.detach().clone() for p in groups[1]["params"]]
    ScaledAdamW(groups, lr=1e-2).step()
    assert not any(map(torch.equal, before, groups[1]["params"]))


def test_a_third_factor_between_the_two_is_none(caplog):
    if not hasattr(lora_config, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    block = adapted(target_modules=["up"], kasa_config=lora_config.KasaConfig())
    with pytest.raises(ValueError, match="found no LoRA pair"):
        lora_param_groups(block)
    assert "a third factor stands between the two" in caplog.text


def test_one_expert_is_a_pair():
    """PEFT keeps the factors of a plain parameter as those of experts, of which there is one."""
    block = adapted(target_modules=[], target_parameters=["up.weight"])
    backward(block)
    assert [pair.name for pair in find_lora_pairs(block)] == ["up"]
    assert max(check_compatibility(block).values()) < 1e-5


class Bare(nn.Module):
    """A layer that holds its factors as bare parameters, as loralib, litgpt and adapters do; A is ``(r, n)``.

    Args:
        turned: A is ``(n, r)``, and B ``(r, m)``: the other convention.
        names: of the two factors.
    """

    def __init__(self, turned: bool = False, names: tuple[str, str] = ("lora_A", "lora_B"), m: int = 6) -> None:
        super().__init__()
        self.scaling, self.names, self.turned = 4.0, names, turned
        for name, shape in zip(names, ((2, 8), (m, 2)), strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(shape[::-1] if turned else shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A, B = (self.get_parameter(name) for name in self.names)
        return x @ (self.scaling * (A @ B if self.turned else (B @ A).mT))


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up")])
def test_bare_parameters_are_found_with_their_scaling(names):
    torch.manual_seed(0)
    for model, name in ((nn.Sequential(Bare(names=names)), "0"), (Bare(names=names), "")):
        backward(model)
        (pair,) = find_lora_pairs(model)
        assert (pair.name, pair.scaling) == (name, 4.0)
        assert pair.A.shape == (2, 8) and pair.B.shape == (6, 2)
        assert max(check_compatibility(model).values()) < 1e-5


def test_torchtunes_names():
    layer = nn.Module()
    layer.lora_a, layer.lora_b, layer.alpha = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False), 16.0
    (pair,) = find_lora_pairs(nn.ModuleDict({"q_proj": layer}))
    assert (pair.name, pair.scaling) == ("q_proj", 8.0) and pair.A is layer.lora_a.weight


@pytest.mark.parametrize("width", [6, 8], ids=["oblong", "square"])
def test_bare_parameters_that_stand_the_other_way_round_are_refused(width, caplog):
    """Of a square layer the shapes multiply either way, and the rank would be the width."""
    model = nn.ModuleList([Bare(turned=True, m=width), Bare()])
    assert lora_param_groups(model)[0]["pair_names"] == ["1"]
    assert "transposed?" in caplog.text


def test_loralibs_adalora_has_a_third_factor(caplog):
    layer = Bare()
    layer.lora_E = nn.Parameter(torch.ones(2, 1))
    assert not find_lora_pairs(nn.Sequential(layer))
    assert "a third factor stands between the two" in caplog.text
