"""Sample position -> training batch.

The run sees one endless sequence of samples, numbered from 0; each passage through the images is in a new random order,
and nothing is dropped at its end. Optimizer step ``s`` takes the positions ``[s·G, (s+1)·G)``, G the global batch size,
however they are divided over processes and micro-batches. What a sample looks like (crop, latent, noise, time) is a
pure function of its position, see ``randomness``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dreamlora.interfaces import Batch, Conditioning, Objective
from dreamlora.randomness import generator, permutation

if TYPE_CHECKING:
    from dreamlora.data.cache import LatentStore


@dataclass(frozen=True)
class Layout:
    """How an optimizer step is divided.

    Attributes:
        batch_size: samples per process and forward pass.
        accumulation: forward passes per optimizer step.
        rank: of this process.
        world: number of processes.
    """

    batch_size: int
    accumulation: int
    rank: int
    world: int

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.batch_size * self.accumulation * self.world

    def positions(self, step: int, micro: int) -> range:
        """Sample positions of micro-batch ``micro`` of step ``step`` (from 0) in this process."""
        start = step * self.global_batch_size + (micro * self.world + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


@dataclass(frozen=True)
class Source:
    """Images that batches are drawn from.

    Attributes:
        name: "instance" or "class"; separates their random draws.
        store: encoded images.
        weight: of their loss.
    """

    name: str
    store: LatentStore
    weight: float


class Stream:
    """Batches of a run by step and micro-batch.

    Args:
        sources: instance images and, with prior preservation, class images; ``batch_size`` of each per micro-batch.
        objective: draws the times.
        conditioning: what the denoiser (or the text encoder that trains) gets for a caption.
        layout: division over processes and micro-batches.
        seed: of the run.
        noise_offset: standard deviation of the offset shared by all pixels of a channel.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        objective: Objective,
        conditioning: Callable[[Sequence[str]], Conditioning],
        layout: Layout,
        *,
        seed: int,
        noise_offset: float = 0.0,
    ) -> None:
        self.sources = sources
        self.layout = layout
        self._objective = objective
        self._conditioning = conditioning
        self._seed = seed
        self._noise_offset = noise_offset
        self._order = functools.lru_cache(maxsize=4)(self._order_of_epoch)

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch ``micro`` of step ``step`` (both from 0) of this process, on the CPU."""
        parts: dict[str, list[torch.Tensor]] = {"latents": [], "noise": [], "uniforms": []}
        captions: list[str] = []
        names: list[str] = []
        weights: list[float] = []
        for source in self.sources:
            for position in self.layout.positions(step, micro):
                index, drawn = self._sample(source, position)
                for key, value in drawn.items():
                    parts[key].append(value)
                captions.append(source.store.captions[index])
                names.append(source.store.names[index])
                weights.append(source.weight / (self.layout.batch_size * self.layout.accumulation))
        return Batch(
            latents=torch.stack(parts["latents"]),
            noise=torch.stack(parts["noise"]),
            times=self._objective.draw_times(torch.stack(parts["uniforms"])),
            conditioning=self._conditioning(captions),
            weights=torch.tensor(weights),
            names=tuple(names),
        )

    def _order_of_epoch(self, source: str, length: int, epoch: int) -> list[int]:
        return permutation(length, self._seed, source, "order", epoch)

    def _sample(self, source: Source, position: int) -> tuple[int, dict[str, torch.Tensor]]:
        length = len(source.store.names)
        epoch, place = divmod(position, length)
        index = self._order(source.name, length, epoch)[place]
        draw = generator(self._seed, source.name, position)
        uniforms = torch.rand(2, generator=draw)
        variant = int(torch.randint(source.store.count(index), (), generator=draw))
        mean, std = source.store.latents(index, variant)
        noise = torch.randn(mean.shape, generator=draw)
        latents = mean + std * torch.randn(mean.shape, generator=draw)
        if self._noise_offset:
            noise = noise + self._noise_offset * torch.randn(mean.shape[0], 1, 1, generator=draw)
        return index, {"latents": latents, "noise": noise, "uniforms": uniforms}


def stack_conditioning(table: Mapping[str, Conditioning], captions: Sequence[str]) -> Conditioning:
    """Batch the entries (each with a leading 1) that ``table`` holds for ``captions``."""
    rows = [table[caption] for caption in captions]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
