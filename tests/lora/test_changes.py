"""Sizes of the changes of all kinds of adapters against PEFT's own dense matrices."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dreamlora.config import Lora
from dreamlora.lora.health import TOTAL, measure, snapshots, update_rms
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.pairs import ADAPTER, tuned_layers

KINDS = {
    "lora": (),
    "rslora": (),
    "dora": (),
    "loha": (),
    "loha tucker": ("use_effective_conv2d", "true"),
    "lokr": (),
    "lokr both": ("decompose_both", "true", "decompose_factor", "4"),
    "lokr tucker": ("use_effective_conv2d", "true"),
}


PAIRS = ("lora", "rslora", "dora")


class Net(nn.Module):
    """A linear layer and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.conv, self.point = nn.Linear(24, 16), nn.Conv2d(24, 16, 3), nn.Conv2d(16, 8, 1)

    def add_adapter(self, config, adapter_name: str) -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


def net(kind: str) -> Net:
    torch.manual_seed(0)
    lora = Lora(
        adapter=kind.split()[0].removeprefix("rs"),
        adapter_args=KINDS[kind],
        rank=2,
        lora_alpha=3.0,
        use_rslora=kind == "rslora",
    )
    made = Net().requires_grad_(False)
    add_lora(made, lora, ["square", "conv", "point"])
    return made


def moved(module: Net, seed: int) -> Net:
    other, draw = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(other).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return other


def dense(module: Net) -> list[Tensor]:
    """What each layer adds to its weight, by PEFT's own merge."""
    found = []
    for layer in tuned_layers(copy.deepcopy(module)):
        before = layer.layer.base_layer.weight.double()
        layer.layer.double()
        layer.layer.merge(adapter_names=[ADAPTER])
        found.append((layer.layer.base_layer.weight - before).detach())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_dense_matrices(kind: str) -> None:
    base = net(kind)
    first, second = moved(base, 1), moved(base, 2)
    whole = math.sqrt(sum(float(change.square().sum()) for change in dense(first)))
    health = measure(snapshots({"": first}))[TOTAL]
    assert health.dw_norm == pytest.approx(whole, rel=1e-5)
    steps = [one - other for one, other in zip(dense(first), dense(second), strict=True)]
    rms = math.sqrt(sum(float(x.square().sum()) for x in steps) / sum(x.numel() for x in steps))
    assert update_rms(snapshots({"": second}), snapshots({"": first}))[TOTAL] == pytest.approx(rms, rel=1e-5)
    assert (health.balance is None) == (kind not in PAIRS)
    assert (health.stable_rank is None) == (kind not in PAIRS)


@pytest.mark.parametrize("kind", KINDS)
def test_none_has_an_effect_at_first_or_when_silenced(kind: str) -> None:
    made = net(kind)
    assert measure(snapshots({"": made}))[TOTAL].dw_norm == 0
    other = moved(made, 1)
    base = answers(other, on=False)
    assert not same(answers(other), base)
    for layer in tuned_layers(other):
        layer.silence()
    assert same(answers(other), base) and same(answers(made), base)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_magnitudes_are_not_rounded_to_the_base_models_precision(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    made = Net().to(precision).requires_grad_(False)
    add_lora(made, Lora(adapter="dora"), ["square", "conv", "point"])
    with torch.autocast("cpu", precision):
        assert same(answers(made), answers(made, on=False))


@torch.no_grad()
def answers(module: Net, *, on: bool = True) -> list[Tensor]:
    x = torch.randn(2, 24, 5, 5, generator=torch.Generator().manual_seed(3))
    for layer in tuned_layers(module):
        layer.layer.enable_adapters(on)
    return [module.square(x[:, :, 0, 0]), module.conv(x), module.point(x[:, :16])]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
