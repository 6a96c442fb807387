"""The fused layer at the sizes of real models: as exact as PEFT's, with no more memory and time."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from dreamlora.lora.fused import FusedLinear, fuse
from dreamlora.lora.pairs import ADAPTER
from tests.gpu.conftest import peak_mib

pytestmark = pytest.mark.gpu

SHAPES = {
    "SD 1.5, self-attention": (4, 4096, 320, 320),
    "SD 1.5, text": (4, 77, 768, 1280),
    "SDXL, self-attention": (1, 1024, 1280, 1280),
}
"""Batch, tokens, inputs and outputs."""
LARGE = (16, 4096, 1280, 1280)
"""So large that the GPU's time counts, and not that of the CPU, which launches as many kernels for a small layer."""
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of results, relative to their norms; TF32 has 3e-4."""
RANK = 16

Shape = tuple[int, int, int, int]
in_every_precision = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def at(device: torch.device, shape: Shape) -> Shape:
    """The shape; a small one on the CPU."""
    return shape if device.type == "cuda" else (1, 5, shape[2] // 40, shape[3] // 40)


def two_layers(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Linear]:
    """The same layer by PEFT and fused; the factors are float32, as in training."""
    _, _, n, m = shape
    layers = {}
    for kind in ("PEFT's", "fused"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(n, m)).to(device, dtype)
        layer = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), net)[0]
        nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.1)
        layer.lora_A.float()
        layer.lora_B.float()
        layers[kind] = layer
    fuse(layers["fused"])
    assert type(layers["PEFT's"]) is Linear and type(layers["fused"]) is FusedLinear
    return layers


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def a_pass(layer: Linear, x: Tensor, gy: Tensor) -> dict[str, Tensor]:
    """Output and gradients, forgotten by the layer."""
    x = x.clone().requires_grad_()
    with autocast(x.device, x.dtype):
        y = layer(x)
    factors = {name: factor for name, factor in layer.named_parameters() if factor.requires_grad}
    grads = torch.autograd.grad(y, [x, *factors.values()], gy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("x", *factors), grads, strict=True))}


def exact(layer: Linear, x: Tensor, gy: Tensor) -> dict[str, Tensor]:
    """The same by formula, in float64."""
    x, gy, W, b, A, B = (
        tensor.detach().double()
        for tensor in (
            x,
            gy,
            *layer.base_layer.parameters(),
            layer.lora_A[ADAPTER].weight,
            layer.lora_B[ADAPTER].weight,
        )
    )
    names = (f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight")
    rows, grad_rows = x.flatten(0, 1), gy.flatten(0, 1)
    factors = dict(zip(names, ((grad_rows @ B).mT @ rows, grad_rows.mT @ (rows @ A.mT)), strict=True))
    return {"y": x @ W.mT + b + x @ A.mT @ B.mT, "x": gy @ W + gy @ B @ A, **factors}


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    batch, tokens, n, m = shape
    torch.manual_seed(1)
    x, gy = torch.randn(batch, tokens, n, device=device), torch.randn(batch, tokens, m, device=device)
    return x.to(dtype), gy.to(dtype)


@in_every_precision
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_as_exact_as_peft_with_no_more_memory(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    shape = at(device, shape)
    layers = two_layers(shape, dtype, device)
    x, gy = inputs(shape, dtype, device)
    passes = {kind: a_pass(layer, x, gy) for kind, layer in layers.items()}
    for name, value in exact(layers["fused"], x, gy).items():
        errors = {kind: float((each[name].double() - value).norm() / value.norm()) for kind, each in passes.items()}
        assert errors["fused"] <= ROUNDING[dtype], (name, errors)
        assert errors["fused"] <= 2 * errors["PEFT's"] + torch.finfo(torch.float32).eps, (name, errors)
        assert passes["fused"][name].dtype == passes["PEFT's"][name].dtype
    peaks = {kind: peak_mib(device, functools.partial(a_pass, layer, x, gy)) for kind, layer in layers.items()}
    assert peaks["fused"] <= 1.02 * peaks["PEFT's"] + 1, peaks


@in_every_precision
def test_it_takes_no_more_time(dtype: torch.dtype, device: torch.device) -> None:
    shape = at(device, LARGE)
    layers = two_layers(shape, dtype, device)
    x, gy = inputs(shape, dtype, device)
    times = medians_ms({kind: functools.partial(a_pass, layer, x, gy) for kind, layer in layers.items()}, device)
    if device.type == "cuda":
        assert times["fused"] <= 1.05 * times["PEFT's"], times


def medians_ms(works: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Of each work's times, taken in turns after a warm-up."""
    times: dict[str, list[float]] = {kind: [] for kind in works}
    for number in range(25 if device.type == "cuda" else 2):
        for kind, work in works.items():
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                times[kind].append(1e3 * (time.perf_counter() - started))
    return {kind: statistics.median(values) for kind, values in times.items()}
