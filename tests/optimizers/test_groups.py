"""Finding LoRA pairs: PEFT layers of every kind, layers by name, and the identity that proves a pair."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamlora.optimizers import (
    ScaledAdamW,
    check_compatibility,
    find_lora_pairs,
    group_without_pairs,
    lora_param_groups,
)
from dreamlora.optimizers._groups import plain_groups, with_fallback_lr

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """One layer of every kind LoRA is put on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.down = nn.Linear(6, 4)  # named like diffusers' old factors, and like UNet blocks
        self.up = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        features = self.grouped(self.conv(images)).mean((2, 3)) + self.embed(tokens)
        return self.head(self.up(torch.relu(self.down(features))))


def adapted(*adapters: str, zero_B: bool = False, **config) -> Net:
    torch.manual_seed(0)
    net = Net()
    settings = {"r": 2, "target_modules": ["conv", "down", "up"], **config}
    for adapter in adapters or ("default",):
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), net, adapter_name=adapter)
    for name, p in net.named_parameters():
        if "lora_" in name and not zero_B:
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        if "lora_" in name:
            p.requires_grad_(True)
    return net


def backward(net: Net) -> None:
    generator = torch.Generator().manual_seed(2)
    out = net(torch.randn(3, 3, 5, 5, generator=generator), torch.tensor([1, 2, 3]))
    out.square().mean().backward()


def names(model, **options) -> list[str]:
    return [pair.name for pair in find_lora_pairs(model, **options)]


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.3}, {"use_rslora": True}])
def test_the_identity_holds_for_found_pairs(config):
    net = adapted(**config).train()
    backward(net)
    errors = check_compatibility(net)
    assert sorted(errors) == ["conv", "down", "up"]
    assert 0 < max(errors.values()) < 1e-5


def test_the_identity_finds_wrong_pairs():
    net = adapted(target_modules=["down", "head"])
    backward(net)
    down, head = find_lora_pairs(net)
    crossed = [type(down)("crossed", down.A, head.B), type(down)("other", head.A, down.B)]
    assert min(check_compatibility(crossed).values()) > 0.1


def test_the_identity_needs_gradients():
    with pytest.raises(ValueError, match="after loss"):
        check_compatibility(adapted())


def test_at_zero_B_the_identity_is_trivial():
    net = adapted(zero_B=True)
    backward(net)
    assert set(check_compatibility(net).values()) == {0.0}


def test_scalings_names_and_order():
    (group,) = lora_param_groups(adapted(lora_alpha=8, use_rslora=True), lr=1e-3, weight_decay=0.1)
    assert group["pair_names"] == ["conv", "down", "up"]
    assert group["scalings"] == pytest.approx([8 / 2**0.5] * 3)
    assert [tuple(p.shape) for p in group["params"][:2]] == [(2, 3, 3, 3), (6, 2, 1, 1)]
    assert (group["lr"], group["weight_decay"], group["lr_ratio_B"], group["lora_pairs"]) == (1e-3, 0.1, 1.0, True)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize(
    ("config", "freeze", "pairs", "others"),
    [
        ({"target_modules": ["conv", "grouped"]}, (), ["conv"], 2),
        ({"target_modules": ["embed", "down"]}, (), ["embed", "down"], 0),
        ({"use_dora": True}, (), ["conv", "down", "up"], 3),
        ({"lora_bias": True}, (), ["conv", "down", "up"], 3),
        ({"modules_to_save": ["head"]}, (), ["conv", "down", "up"], 2),
        ({}, ("down.lora_A.default.weight",), ["conv", "up"], 1),
        ({}, ("down.lora_A.default.weight", "down.lora_B.default.weight"), ["conv", "up"], 0),
    ],
    ids=["grouped", "embedding", "dora", "bias", "modules_to_save", "half frozen", "frozen"],
)
def test_what_is_a_pair_and_what_falls_back(config, freeze, pairs, others):
    net = adapted(**config)
    for name in freeze:
        net.get_parameter(name).requires_grad_(False)
    groups = lora_param_groups(net)
    assert sorted(groups[0]["pair_names"]) == sorted(pairs)
    assert sum(len(group["params"]) for group in groups[1:]) == others
    assert all(not group["lora_pairs"] for group in groups[1:])
    ScaledAdamW(groups)


def test_refused_pairs_are_reported(caplog):
    net = adapted()
    net.down.lora_A["default"].weight.requires_grad_(False)
    lora_param_groups(net)
    assert "1 LoRA layers are trained without preconditioning: a factor is frozen" in caplog.text


def test_two_adapters_and_a_choice_among_them():
    net = adapted("cat.v1".replace(".", "_"), "dog", use_dora=True)
    for p in (p for name, p in net.named_parameters() if "lora_" in name):
        p.requires_grad_(True)
    assert len(names(net)) == 6
    groups = lora_param_groups(net, adapter_names=["dog"])
    assert groups[0]["pair_names"] == ["conv[dog]", "down[dog]", "up[dog]"]
    assert len(groups[1]["params"]) == 3  # dog's magnitudes, not the cat's anything
    assert lora_param_groups(net, adapter_names="dog")[0]["pair_names"] == groups[0]["pair_names"]
    with pytest.raises(ValueError, match="bird"):
        lora_param_groups(net, adapter_names=["bird"])


def test_shared_factors_fall_back_and_shared_layers_count_once():
    net = adapted(target_modules=["down", "up", "head"])
    net.head.lora_A["default"].weight = net.down.lora_A["default"].weight
    groups = lora_param_groups(net)
    assert groups[0]["pair_names"] == ["up"] and len(groups[1]["params"]) == 3
    twice = adapted()
    assert len(lora_param_groups([twice, twice])[0]["pair_names"]) == 3


def test_several_modules_with_one_rate_or_with_their_own():
    unet, text = adapted(), adapted(target_modules=["down"], use_dora=True)
    together = lora_param_groups([unet, text], lr=1e-4, fallback_lr=1e-6)
    assert [len(g["params"]) for g in together] == [8, 1] and [g["lr"] for g in together] == [1e-4, 1e-6]
    apart = lora_param_groups(unet, lr=1e-4) + lora_param_groups(text, lr=5e-6)
    assert [(len(g["params"]), g["lr"]) for g in ScaledAdamW(apart).param_groups] == [(6, 1e-4), (2, 5e-6), (1, 5e-6)]


def test_a_model_without_pairs_is_refused():
    with pytest.raises(ValueError, match="no LoRA pair"):
        lora_param_groups(Net())


def layer(first: str, second: str, alpha: float | None = None, tail: str = "") -> nn.Module:
    """A LoRA layer of another maker: ``first``/``second`` hold the factors, below ``tail`` if given."""
    owner = nn.Module()
    for name, linear in ((first, nn.Linear(5, 2, bias=False)), (second, nn.Linear(2, 4, bias=False))):
        owner.add_module(name, nn.ModuleDict({tail: linear}) if tail else linear)
    if alpha is not None:
        owner.register_buffer("alpha", torch.tensor(alpha))
    return owner


def test_layers_by_name():
    net = nn.ModuleDict(
        {
            "kohya": layer("lora_down", "lora_up", alpha=8.0),
            "to_q_lora": layer("down", "up"),
            "block": layer("down", "up"),  # a UNet block, no LoRA
            "lora_A": nn.ModuleDict({"inner": layer("lora_A", "lora_B", tail="mine")}),
        }
    )
    found = {pair.name: pair for pair in find_lora_pairs(net)}
    assert sorted(found) == ["kohya", "lora_A.inner", "to_q_lora"]
    assert found["kohya"].scaling == 4.0 and found["to_q_lora"].scaling == 1.0
    assert found["kohya"].A is net["kohya"].lora_down.weight and found["kohya"].B is net["kohya"].lora_up.weight
    assert names(net, adapter_names=["mine"]) == ["lora_A.inner"]


def test_plain_groups_split_factors_only_for_lora_plus():
    net = adapted(use_dora=True)
    same = plain_groups(lora_param_groups(net, lr=1e-3), 1.0)
    assert [(len(g["params"]), g["lr"]) for g in same] == [(6, 1e-3), (3, 1e-3)]
    split = plain_groups(lora_param_groups(net, loraplus_ratio=16.0), 0.5)
    assert [(len(g["params"]), g.get("lr")) for g in split] == [(3, None), (3, 8.0), (3, None)]
    assert all(p.shape[0] == 2 for p in split[0]["params"]) and all(p.shape[1] == 2 for p in split[1]["params"])


def test_a_real_network_trains():
    net = adapted(zero_B=True, use_dora=True)
    optimizer = ScaledAdamW(lora_param_groups(net), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(torch.ones(3, 3, 5, 5), torch.tensor([1, 2, 3])) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_group_without_pairs_may_keep_its_rate():
    group = {"params": [], "lora_pairs": False, "lr": 0.5}
    groups = [
        {"params": [], "lora_pairs": True, "lr": 2.0},
        group,
        {**group, "own_lr": True},
        {**group, "own_lr": False},
    ]
    assert [each["lr"] for each in with_fallback_lr(groups, 1e-4)] == [2.0, 1e-4, 0.5, 1e-4]
    assert "own_lr" not in plain_groups(groups, 1.0)[2]


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_adapters_without_pairs_are_one_group(config):
    net = Net()
    with pytest.raises(ValueError, match="nothing requires gradients"):
        group_without_pairs(net.requires_grad_(False))
    peft.inject_adapter_in_model(config(r=2, target_modules=["conv", "down"]), net)
    with pytest.raises(ValueError, match="found no LoRA pair"):
        lora_param_groups(net)
    [group] = group_without_pairs([net], lr=0.5)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert dict(zip(group["names"], group["params"], strict=True)) == trained
    assert (group["lora_pairs"], group["lr"], "weight_decay" in group) == (False, 0.5, False)


def test_magnitudes_of_a_dora_are_no_part_of_its_pairs():
    pairs, rest = lora_param_groups(adapted(use_dora=True), lr=0.5)
    assert all(name.endswith("lora_magnitude_vector.default.weight") for name in rest["names"])
    assert 2 * len(rest["params"]) == len(pairs["params"]) and rest["lr"] == 0.5
