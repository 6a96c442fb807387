"""The one place where LoRA layers are found, and what its record says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dreamlora.lora.pairs import adapted_layers, layers_below_rank
from dreamlora.optimizers import find_lora_pairs
from tests.inits.problems import ALPHA, RANK, Net, problem

ROOT = Path(__file__).parents[2] / "dreamlora"


class Wrapped(nn.Module):
    """As DDP holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_the_record_is_the_layers() -> None:
    net = problem().net
    conv, square, out = adapted_layers(net)
    assert [layer.name for layer in (conv, square, out)] == ["conv", "square", "out"]
    assert conv.A is net.conv.lora_A["default"].weight and conv.B is net.conv.lora_B["default"].weight
    assert conv.layer is net.conv and conv.start is None
    assert (conv.scaling, conv.rank, conv.shapes) == (ALPHA / RANK, RANK, ((RANK, 27), (8, RANK)))
    assert [layer.name for layer in adapted_layers(net, prefix="unet")] == ["unet.conv", "unet.square", "unet.out"]
    assert not list(adapted_layers(Net()))


def test_layers_with_fewer_inputs_or_outputs_than_ranks_are_counted() -> None:
    net = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3), nn.Linear(4, 4), nn.Conv2d(1, 9, 2))
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0", "1", "2", "3"]), net)
    assert layers_below_rank(net) == (2, 4)


def test_optimizers_find_the_same_pairs() -> None:
    net = problem().net
    pairs = [(pair.name, id(pair.A), id(pair.B), pair.scaling) for pair in find_lora_pairs(net)]
    assert pairs == [(layer.name, id(layer.A), id(layer.B), layer.scaling) for layer in adapted_layers(net)]


def test_wrappers_and_other_adapters_change_nothing() -> None:
    net = problem().net
    names = [layer.name for layer in adapted_layers(net)]
    assert [layer.name for layer in adapted_layers(Wrapped(torch.compile(net)))] == names
    other = LoraConfig(r=3, target_modules=["out"])
    net.out.update_layer("other", 3, 3, config=other)
    assert [(layer.name, layer.rank) for layer in adapted_layers(net)] == [(name, RANK) for name in names]


def test_the_factors_with_a_frozen_start_are_those_of_the_distance() -> None:
    (layer, *_), draw = adapted_layers(problem().net), torch.Generator().manual_seed(0)
    for factor in (layer.A, layer.B):
        factor.data = torch.randn(factor.shape, generator=draw)
    started = layer.with_start(layer.A, layer.B)
    down, up = started.factors()
    assert (down.shape[0], up.shape[1]) == (2 * RANK, 2 * RANK)
    assert not (up.flatten(1) @ down.flatten(1)).any()
    before = layer.B.flatten(1) @ layer.A.flatten(1)
    layer.A.data *= 2
    down, up = started.factors()
    torch.testing.assert_close(up.flatten(1) @ down.flatten(1), before)
    assert next(adapted_layers(nn.ModuleList([layer.layer]))).start is started.start


@pytest.mark.parametrize("word", ["lora_A[", "lora_B[", "scaling["])
def test_nobody_else_takes_layers_apart(word: str) -> None:
    """But those that compute a layer's output, and the optimizers, which know no PEFT."""
    computing = {"lora/pairs.py", "lora/fused.py", "lora/offset.py"}
    users = {str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py") if word in file.read_text(encoding="utf-8")}
    assert "lora/pairs.py" in users and {user for user in users if not user.startswith("optimizers/")} <= computing
