"""Blocks that wait in host memory, with the streams of a real GPU: the same bits as without, in less memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreamlora.models.offload import SLOTS, Offload, waiting_blocks
from tests.gpu.conftest import Train, peak_mib
from tests.gpu.test_resume import reproducible

pytestmark = pytest.mark.gpu

BLOCKS, PASSES = 12, 4
WIDTH, TOKENS = 3072, 4096
"""Of a block whose products take about as long as the copy of its weights, so that either can be late."""


class WideBlock(nn.Module):
    """Two large products, and a factor that trains."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(width, width, device=device) for _ in range(2))
        self.requires_grad_(False)
        self.factor = nn.Parameter(torch.ones(width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * self.down(torch.nn.functional.gelu(self.up(x)))


class Wide(nn.Module):
    """Blocks with gradient checkpointing."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([WideBlock(width, device) for _ in range(BLOCKS)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def wait(self, count: int, device: torch.device) -> None:
        """Let blocks wait, as if they came from a file."""
        factors = [block.factor for block in self.blocks]
        for block in self.blocks:
            del block.factor
        Offload(waiting_blocks(self, count), device)
        for block, factor in zip(self.blocks, factors, strict=True):
            block.factor = factor


def gradients(model: Wide, x: Tensor) -> list[Tensor]:
    """Of several passes that the GPU is asked for without a pause."""
    found = []
    for number in range(PASSES):
        model.zero_grad()
        model(x * (1 + number)).square().mean().backward()
        found += [block.factor.grad.clone() for block in model.blocks]
    return found


@pytest.mark.parametrize("tokens", [8, TOKENS], ids=["the copies are late", "the products are late"])
@pytest.mark.parametrize("count", [1, 3, BLOCKS - SLOTS])
def test_the_bits_are_the_same_whoever_is_late(device: torch.device, count: int, tokens: int) -> None:
    width = WIDTH if device.type == "cuda" else 8
    model = Wide(width, device)
    x = torch.randn(tokens, width, device=device)
    with reproducible():
        expected = gradients(model, x)
        model.wait(count, device)
        found = gradients(model, x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_memory_of_all_but_two_is_free(device: torch.device) -> None:
    width = WIDTH if device.type == "cuda" else 8
    block_mib = 2 * 4 * width * (width + 1) / 2**20
    x = torch.randn(8, width, device=device)
    peaks = []
    for count in (0, BLOCKS - SLOTS):
        made: list[Wide] = []

        def run(count: int = count, made: list[Wide] = made) -> None:
            model = Wide(width, torch.device("cpu"))
            if count:
                model.wait(count, device)
            made.append(model.to(device))
            gradients(made[0], x)

        peaks.append(peak_mib(device, run))
    if device.type == "cuda":
        assert peaks[0] - peaks[1] == pytest.approx((BLOCKS - 2 * SLOTS) * block_mib, rel=0.1)


def test_host_memory_is_pinned_and_given_back(device: torch.device) -> None:
    model = Wide(64, torch.device("cpu"))
    model.wait(BLOCKS - SLOTS, device)
    block = waiting_blocks(model, BLOCKS - SLOTS)[0]
    weight = block.up.weight
    assert weight.device.type == "cpu" and weight.is_pinned() == (device.type == "cuda")
    del model, block
    assert not weight.is_pinned()


@pytest.mark.parametrize(
    "more", ["", "--base_precision int8 --adapter dora", "--init pissa", "--train_text_encoder --init nora"]
)
def test_a_run_is_the_same_with_and_without(train: Train, device: torch.device, more: str) -> None:
    count = "14" if device.type == "cuda" else "2"
    flags = f"--gradient_checkpointing --eval_steps 0 --no_parity_check --checkpointing_steps 0 {more}".split()
    with reproducible():
        plain, waiting = train("bf16", "adamw", *flags), train("bf16", "adamw", *flags, "--offload_blocks", count)
    assert waiting.values("train/loss") == plain.values("train/loss")
    ours, theirs = (load_file(run.folder.lora_file) for run in (waiting, plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    if device.type == "cuda":
        peaks = [
            json.loads(run.folder.summary_file.read_text(encoding="utf-8"))["peak_memory_gib"]
            for run in (plain, waiting)
        ]
        assert peaks[1] < peaks[0]
