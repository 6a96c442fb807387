"""What an init is told and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.lora.pairs import AdaptedLayer
from dreamlora.precision import dense_weight
from dreamlora.randomness import generator, seed_of


@dataclass(frozen=True)
class Start:
    """The factors that training begins with, convolutions flattened behind dimension 0.

    Attributes:
        A: ``(r, n)`` float32.
        B: ``(m, r)`` float32.
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Target(AdaptedLayer):
    """A layer to start; ``name`` is its path in ``Probe.model``.

    Attributes:
        key: of its random draws.
    """

    key: tuple[int | str, ...]

    def generator(self) -> torch.Generator:
        """For draws that depend on the seed and the layer's name alone."""
        return generator(*self.key)

    @property
    def seed(self) -> int:
        """For code that draws from torch's global stream."""
        return seed_of(*self.key)

    def size(self, flag: str, least: int) -> tuple[int, int]:
        """``(m, n)`` of the layer's weight, convolutions flattened.

        Args:
            flag: what asks, for messages.
            least: what m and n must be at least.

        Raises:
            UserError: the product of the factors does not have this shape, or it is too small.
        """
        weight = self.layer.base_layer.weight
        (rank, n), (m, columns) = self.shapes
        if not weight.is_floating_point() or columns != rank or weight.flatten(1).shape != (m, n):
            raise UserError(
                f"{flag} needs layers whose weight B·A can equal; {self.name} is quantised or a grouped convolution. "
                "Leave it out of --lora_layers, or use --init gaussian"
            )
        if min(m, n) < least:
            raise UserError(
                f"{flag} with --rank {rank} needs layers of at least {least} inputs and outputs; {self.name} has "
                f"{n} and {m}. Give a smaller --rank, or leave it out of --lora_layers"
            )
        return m, n

    def weight(self) -> Tensor:
        """W₀ ``(m, n)`` as a float32 copy."""
        weight = dense_weight(self.layer.base_layer, device=self.A.device)
        return weight.detach().flatten(1).to(torch.float32, copy=True)


@dataclass(frozen=True)
class Probe:
    """The run's model and fixed draws of (image, time, noise), for inits that look at data.

    Attributes:
        model: everything that trains, as one module.
        loss: of batch ``number`` (from 0) in training mode, weighted as in training, with its graph; the same number
            gives the same draws. Processes do not talk to each other in it.
        batch_size: draws per batch.
        rank, world: this process, and how many there are.
        total: sums a tensor over the processes.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    batch_size: int
    rank: int
    world: int
    total: Callable[[Tensor], Tensor]

    def batches(self, draws: int) -> int:
        """Batches that hold at least ``draws`` draws."""
        return -(-draws // self.batch_size)
