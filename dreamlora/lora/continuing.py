"""Training that goes on from a LoRA: the same ΔW in other ranks, and layers that it did not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dreamlora.lora.low_rank import Cut, kept, shape_of, spectrum_of
from dreamlora.lora.weights import AdapterWeights, LayerWeights, lora_weights


@dataclass(frozen=True)
class Predecessor:
    """A LoRA that training goes on from.

    Attributes:
        file: that it was read from.
        content: what the file holds, in a few digits.
        adapters: by part of the pipeline and name of the layer there.
        embeddings: of its new tokens: ``[n, d]`` by token and text encoder.
    """

    file: Path
    content: str
    adapters: AdapterWeights
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def kinds(self) -> set[str]:
        """Names of ``adapters/``, one each of its layers; a DoRA may have layers without magnitudes."""
        kinds = {each.kind if each.magnitude is None else "dora" for each in self._layers()}
        return kinds - {"lora"} if "dora" in kinds else kinds

    @property
    def rank(self) -> int:
        """Of most layers."""
        return Counter(each.rank or 1 for each in self._layers()).most_common(1)[0][0]

    @property
    def scale(self) -> float:
        """Of most layers: alpha / rank."""
        return Counter(each.scale for each in self._layers()).most_common(1)[0][0]

    def _layers(self) -> Iterator[LayerWeights]:
        return (each for layers in self.adapters.values() for each in layers.values())


class Resized(NamedTuple):
    """A LoRA of another rank.

    Attributes:
        weights: in float32.
        lost, all: how much of ``‖ΔW‖²`` it lacks, and ``‖ΔW‖²``; zeros where nothing was cut off.
    """

    weights: LayerWeights
    lost: float = 0.0
    all: float = 0.0


def resized(weights: LayerWeights, rank: int, scale: float, draw: torch.Generator) -> Resized:
    """The same ΔW with another rank and another scale; as it is, to the last bit, where both are its own.

    A higher rank gets rows of A as a start has them, which B's zeros keep from having an effect. A lower one keeps the
    largest singular values.

    Args:
        weights: of a LoRA or DoRA.
        rank: wanted.
        scale: wanted, alpha / rank.
        draw: for rows that are new.
    """
    found, lost, energy = weights.in_precision(torch.float32), 0.0, 0.0
    if rank < len(found.down):
        spectrum = spectrum_of(found)
        small = kept(spectrum, Cut(rank=rank), shape_of(found), found.scale)
        found = replace(small.weights.in_precision(torch.float32), magnitude=found.magnitude)
        energy, lost = spectrum.energy, small.error**2 * spectrum.energy
    more = rank - len(found.down)
    if more > 0:
        rows = torch.empty(more, *found.down.shape[1:]).normal_(std=1 / rank, generator=draw)
        zeros = found.up.new_zeros(len(found.up), more, *found.up.shape[2:])
        factors = torch.cat([found.down, rows]), torch.cat([found.up, zeros], dim=1)
        found = lora_weights(*factors, found.scale * rank, found.magnitude)
    return Resized(found if found.scale == scale else found.with_alpha(scale * rank), lost, energy)


def fresh(layer: nn.Module, rank: int, scale: float, draw: torch.Generator) -> LayerWeights:
    """A LoRA without effect, as a start draws it.

    Args:
        layer: a linear layer or convolution without groups.
    """
    shape: torch.Size = layer.weight.shape  # type: ignore[assignment]
    down = torch.empty(rank, *shape[1:]).normal_(std=1 / rank, generator=draw)
    return lora_weights(down, torch.zeros(shape[0], rank, *(1 for _ in shape[2:])), scale * rank)


def with_magnitudes(weights: LayerWeights, layer: nn.Module) -> LayerWeights:
    """A DoRA without effect of a LoRA without: its magnitudes are about those of the layer."""
    base: torch.Tensor = layer.weight  # type: ignore[assignment]
    return replace(weights, magnitude=base.detach().float().flatten(1).norm(dim=1))
