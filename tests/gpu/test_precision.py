"""Frozen weights in fewer bits on a GPU: the same numbers as on the CPU, less memory, and runs that learn."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dreamlora.precision import FORMS, QuantizedLinear, quantized_bytes
from tests.gpu.conftest import Train, peak_mib

pytestmark = pytest.mark.gpu

FEWER = ("fp8", "int8", "nf4")
SIDE = 2048


@pytest.fixture(params=list(FORMS))
def word(request: pytest.FixtureRequest) -> str:
    if request.param == "nf4":
        request.getfixturevalue("bitsandbytes")
    return str(request.param)


def a_layer(side: int) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(side, side, dtype=torch.bfloat16).requires_grad_(False)


def test_the_unpacked_weight_is_that_of_the_cpu(device: torch.device, word: str) -> None:
    plain = a_layer(256)
    here = QuantizedLinear(copy.deepcopy(plain), word).weight
    there = QuantizedLinear(copy.deepcopy(plain).to(device), word).weight.cpu()
    # the blocks' own scales are rounded to 8 bits in nf4, where the sum's order decides
    tolerance = 1e-2 if word == "nf4" else 0
    assert float((there.float() - here.float()).norm() / here.float().norm()) <= tolerance


def test_a_layer_holds_no_more_than_its_numbers(device: torch.device, word: str) -> None:
    side = SIDE if device.type == "cuda" else 64
    plain = a_layer(side).to(device)
    stored: list[QuantizedLinear] = []
    x = torch.randn(64, side, device=device, dtype=torch.bfloat16, requires_grad=True)
    stored.append(QuantizedLinear(plain, word))
    held = sum(buffer.numel() * buffer.element_size() for buffer in stored[0].buffers())
    assert held == quantized_bytes(plain, word)
    del plain
    stored[0](x).float().sum().backward()  # the first product takes a workspace
    peak = peak_mib(device, lambda: stored[0](x).float().sum().backward())
    unpacked = side * side * 2 / 2**20
    assert peak <= 2.6 * unpacked + 2, "one unpacked weight at a time, and what makes it"


@pytest.mark.parametrize("word", FEWER)
def test_a_run_learns(train: Train, device: torch.device, word: str, request: pytest.FixtureRequest) -> None:
    if word == "nf4":
        request.getfixturevalue("bitsandbytes")
    run = train("bf16", "adamw", "--base_precision", word)
    losses = run.values("eval/loss")
    assert losses[max(losses)] < losses[0] * (1 if device.type == "cuda" else 1.001), "a few weights learn little"
    assert all(tensor.any() for name, tensor in load_file(run.folder.lora_file).items() if "lora_B" in name)
    assert run.unfused == 0
