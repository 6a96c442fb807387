"""A small network with LoRA on Linear and Conv2d layers, and fixed batches with a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dreamlora import registry
from dreamlora.inits._start import Probe, Start, Target
from dreamlora.lora.pairs import adapted_layers
from tests.fakemps import moved, on_mps

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK
BATCH, BATCHES = 3, 4


class Net(nn.Module):
    """A strided 3x3 convolution, then a Linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.square = nn.Linear(8, 8)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        return self.out(torch.tanh(self.square(torch.tanh(self.square(x)))))


@dataclass
class Problem:
    """The network, what an init is given, and the same network before the LoRA was added."""

    net: nn.Module
    base: nn.Module
    targets: list[Target]
    probe: Probe
    batches: list[Tensor]

    def start(self, name: str, attach: bool = True, **settings: object) -> list[Start]:
        """Start all layers as ``--init name`` does."""
        method = registry.load("inits", name)
        starts = list(method.starts(self.targets, method.Options(**settings), self.probe))
        for target, start in zip(self.targets, starts, strict=True):
            target.A.data.copy_(start.A.reshape(target.A.shape))
            target.B.data.copy_(start.B.reshape(target.B.shape))
        if attach and method.OFFSET:
            self.targets = [target.with_start(target.A, target.B) for target in self.targets]
        return starts

    def mean_gradients(self) -> list[Tensor]:
        """Of the full weights of all targets ``(m, n)``, by autograd on the network without LoRA."""
        weights = [self.base.get_submodule(target.name).weight.requires_grad_() for target in self.targets]
        total = sum(loss_of(self.base, batch) for batch in self.batches) / len(self.batches)
        return [gradient.flatten(1) for gradient in torch.autograd.grad(total, weights)]

    def change(self) -> list[Tensor]:
        """s·ΔW ``(m, n)`` of all targets."""
        factors = (target.factors() for target in self.targets)
        return [SCALE * up.flatten(1) @ down.flatten(1) for down, up in factors]


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    """Mean squared error against a fixed function of the input."""
    return F.mse_loss(net(batch), batch.mean((1, 2, 3))[:, None, None].expand(-1, 16, 6))


def problem(rank: int = RANK, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Problem:
    """The same every time."""
    torch.manual_seed(1)
    base = Net().to(dtype).requires_grad_(False)  # as under the LoRA: torch picks its kernel by this too
    net = Net().to(dtype)
    net.load_state_dict(base.state_dict())
    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["conv", "square", "out"])
    net = inject_adapter_in_model(config, net)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    batches = [torch.randn(BATCH, 3, 8, 8).to(dtype) for _ in range(BATCHES)]
    return Problem(net, base, targets_of(net), probe_of(net, batches), batches)


def targets_of(net: nn.Module) -> list[Target]:
    return [Target(**vars(layer), key=(0, layer.name)) for layer in adapted_layers(net)]


def on_device(made: Problem) -> Problem:
    """The same on the fake device."""
    net, batches = moved(copy.deepcopy(made.net)), [on_mps(batch) for batch in made.batches]
    return Problem(net, made.base, targets_of(net), probe_of(net, batches), batches)


def probe_of(
    net: nn.Module, batches: list[Tensor], rank: int = 0, world: int = 1, total: Callable | None = None
) -> Probe:
    return Probe(net, lambda number: loss_of(net, batches[number]), BATCH, rank, world, total or (lambda value: value))
