"""The blocks of every family are compiled without a gap; only tracing is tried here, which is what models differ in."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dreamlora.config import Lora
from dreamlora.interfaces import Components, Conditioning
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.targets import wanted_layers
from dreamlora.models import compiling
from tests.families.test_contract import case, drawn_times, encoded, parts, predicted, views

__all__ = ["case", "parts"]  # fixtures

FAMILIES = ("sd", "sd3", "flux2", "qwen_image", "hidream")
"""Blocks in a UNet; in lists of which the class names none; and of which it does."""
GAPS = {"hidream": "how many places an expert of its mixture gets is known when it is computed"}
"""Families whose blocks are compiled in several pieces, and why."""


@pytest.fixture(autouse=True)
def only_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are torch's own, as making others takes a minute."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend="eager", **how))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def gradients(case: SimpleNamespace, parts: Components, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    denoiser: nn.Module = parts[case.family.DENOISER]
    denoiser.zero_grad()
    predicted(case, parts, **inputs).square().mean().backward()
    return {name: p.grad for name, p in trainable_parameters(denoiser).items() if p.grad is not None}


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_compiled_blocks_give_the_same_gradients_in_one_piece(case, parts) -> None:
    denoiser: Any = parts[case.family.DENOISER]
    add_lora(denoiser, Lora(rank=2), wanted_layers(Lora(), case.family))
    for name, parameter in trainable_parameters(denoiser).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    denoiser.enable_gradient_checkpointing()
    denoiser.train()
    conditioning: Conditioning = {**encoded(case, parts, ["a cat", "a dog"]), **views(case, 2)}
    inputs = {"noisy": torch.randn(2, *case.tiny.latents), "times": drawn_times(case, parts, 2)}
    inputs["conditioning"] = conditioning
    names, plain = list(denoiser.state_dict()), gradients(case, parts, inputs)
    with torch.no_grad():
        drawn = predicted(case, parts, **inputs)

    compiling.compile_blocks(denoiser, shapes=1)
    assert list(denoiser.state_dict()) == names
    got = gradients(case, parts, inputs)
    made = counters["stats"]["unique_graphs"]
    assert made and got.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    again = gradients(case, parts, inputs)
    assert all(torch.equal(again[name], got[name]) for name in got) and counters["stats"]["unique_graphs"] == made
    with torch.no_grad():
        assert torch.equal(predicted(case, parts, **inputs), drawn), "drawing is not compiled"
    assert bool(counters["graph_break"]) == (case.name in GAPS), dict(counters["graph_break"])
