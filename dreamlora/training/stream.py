"""Sample position -> training batch.

The run sees one endless sequence of samples, numbered from 0; each passage through the images is in a new random order,
and nothing is dropped at its end. Optimizer step ``s`` takes the positions ``[s·G, (s+1)·G)``, G the global batch size,
however they are divided over processes and micro-batches. What a sample looks like (caption, crop, latent, noise, time)
is a pure function of its position, see ``randomness``.

With aspect-ratio buckets the order of an epoch is arranged so that nearly every step finds images of one size
(``arranged``). Steps that do not, since few images are left of each size, are split: a micro-batch is then several
batches, one for every size in it, weighted so that every sample counts the same.
"""

from __future__ import annotations

import functools
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dreamlora.interfaces import Batch, Conditioning, Objective
from dreamlora.randomness import generator, permutation

if TYPE_CHECKING:
    from dreamlora.data.stores import LatentStore


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
        caption: which of an image's captions is seen at a sample position, and what becomes of it, by (captions,
            source's name, position).
        buckets: number of every image's bucket; None if all have one size.
        places: the image at every place of an epoch, before it is shuffled; None: every image once, in order.
        shares: factor of every image's loss besides ``weight``; None: 1.
    """

    name: str
    store: LatentStore
    weight: float
    caption: Callable[..., str] = lambda captions, *position: captions[0]
    buckets: Sequence[int] | None = None
    places: Sequence[int] | None = None
    shares: Sequence[float] | None = None

    @property
    def length(self) -> int:
        """Samples in an epoch."""
        return len(self.store.names if self.places is None else self.places)


class Stream:
    """Batches of a run by step and micro-batch.

    Args:
        sources: instance images and, with prior preservation, class images; ``batch_size`` of each per micro-batch.
        objective: draws the times.
        conditioning: what the denoiser (or the text encoder that trains) gets for captions, by what belongs to their
            images.
        layout: division over processes and micro-batches.
        seed: of the run.
        noise_offset: standard deviation of the offset shared by all pixels of a channel.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        objective: Objective,
        conditioning: Callable[[Sequence[str], Conditioning], Conditioning],
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
        self._reader = ThreadPoolExecutor(1, "reader")
        self._coming: tuple[tuple[int, int], Future[list[Batch]]] | None = None

    def read_ahead(self, step: int, micro: int) -> None:
        """Begin to read a micro-batch in a thread. Nothing else may read these stores until ``batches`` gave it."""
        self._coming = (step, micro), self._reader.submit(self._read, step, micro)

    def batches(self, step: int, micro: int) -> list[Batch]:
        """Micro-batch ``micro`` of step ``step`` (both from 0) of this process, on the CPU: a batch for every size.

        Raises:
            UserError: a file of the cache was removed or damaged.
        """
        coming, self._coming = self._coming, None
        if coming and coming[0] == (step, micro):
            return coming[1].result()
        if coming:
            wait([coming[1]])  # stores are read by one thread at a time
        return self._read(step, micro)

    def _read(self, step: int, micro: int) -> list[Batch]:
        by_shape: dict[tuple[torch.Size, ...], list[_PlacedSample]] = defaultdict(list)
        for source in self.sources:
            for position in self.layout.positions(step, micro):
                drawn = self._sample(source, position)
                by_shape[drawn.shapes].append(drawn)
        return [self._batch(samples) for samples in by_shape.values()]

    def _batch(self, samples: Sequence[_PlacedSample]) -> Batch:
        share = self.layout.batch_size * self.layout.accumulation
        height, width = samples[0].latents.shape[-2:]
        views = stack_conditioning([drawn.view for drawn in samples], {})
        return Batch(
            latents=torch.stack([drawn.latents for drawn in samples]),
            noise=torch.stack([drawn.noise for drawn in samples]),
            times=self._objective.draw_times(torch.stack([drawn.uniforms for drawn in samples]), (height, width)),
            conditioning={**self._conditioning([drawn.caption for drawn in samples], views), **views},
            weights=torch.tensor([drawn.weight / share for drawn in samples]),
            names=tuple(drawn.name for drawn in samples),
            masks=_masks(samples),
        )

    def _order_of_epoch(self, name: str, length: int, epoch: int) -> Sequence[int]:
        """The image at every place."""
        source = next(source for source in self.sources if source.name == name)
        order = array("q", permutation(length, self._seed, name, "order", epoch))
        if source.places is not None:
            order = array("q", (source.places[place] for place in order))
        if source.buckets is None:
            return order
        return arranged(order, source.buckets, self.layout.global_batch_size, epoch * length)

    def _sample(self, source: Source, position: int) -> _PlacedSample:
        epoch, place = divmod(position, source.length)
        index = self._order(source.name, source.length, epoch)[place]
        draw = generator(self._seed, source.name, position)
        uniforms = torch.rand(2, generator=draw)
        variant = int(torch.randint(source.store.count(index), (), generator=draw))
        mean, std = source.store.latents(index, variant)
        noise = torch.randn(mean.shape, generator=draw)
        latents = mean + std * torch.randn(mean.shape, generator=draw)
        if self._noise_offset:
            noise = noise + self._noise_offset * torch.randn(mean.shape[0], 1, 1, generator=draw)
        caption = source.caption(source.store.captions[index], source.name, position)
        weight = source.weight * (1.0 if source.shares is None else source.shares[index])
        mask = source.store.mask(index, variant)
        view = source.store.view(index, variant)
        return _PlacedSample(latents, noise, uniforms, caption, source.store.names[index], weight, mask, view)


class _PlacedSample(NamedTuple):
    """One sample."""

    latents: torch.Tensor
    noise: torch.Tensor
    uniforms: torch.Tensor
    caption: str
    name: str
    weight: float
    mask: torch.Tensor | None
    view: Conditioning

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Samples of other shapes cannot be of one batch."""
        # by name: entries of the cache come in any order
        return self.latents.shape, *(self.view[name].shape for name in sorted(self.view))


def _masks(samples: Sequence[_PlacedSample]) -> torch.Tensor | None:
    """``[B, 1, h, w]``, white for samples without a mask; None if none has one."""
    if all(drawn.mask is None for drawn in samples):
        return None
    white = torch.ones(1, *samples[0].latents.shape[1:])
    return torch.stack([white if drawn.mask is None else drawn.mask for drawn in samples])


def arranged(order: Sequence[int], buckets: Sequence[int], size: int, start: int) -> Sequence[int]:
    """``order``, rearranged so that most steps see one bucket; no image is left out or comes twice.

    Whole steps of one bucket come first to last in the order in which ``order`` completes them. What remains of every
    bucket, less than a step each, stands before and after them, bucket by bucket: before, just enough to begin the
    whole steps where a step of the run begins.

    Args:
        order: the epoch's images in random order.
        buckets: of every image.
        size: samples per step.
        start: position of the epoch's first sample in the run.
    """
    waiting: dict[int, list[int]] = defaultdict(list)
    steps: list[list[int]] = []
    for image in order:
        bucket = waiting[buckets[image]]
        bucket.append(image)
        if len(bucket) == size:
            steps.append(list(bucket))
            bucket.clear()
    rest = [image for bucket in sorted(waiting) for image in waiting[bucket]]
    head = -start % size
    if head > len(rest) and steps:
        rest += steps.pop()
    return array("q", [*rest[:head], *(image for step in steps for image in step), *rest[head:]])


def stack_conditioning(rows: Sequence[Conditioning], length_axes: Mapping[str, int]) -> Conditioning:
    """Batch the conditioning of single captions, each tensor with a leading 1.

    Args:
        rows: of the captions.
        length_axes: see ``Family.LENGTH_AXES``; along these axes tensors are padded with zeros to the longest.
    """
    return {name: torch.cat(_padded([row[name] for row in rows], length_axes.get(name))) for name in rows[0]}


def _padded(tensors: list[torch.Tensor], axis: int | None) -> list[torch.Tensor]:
    if axis is None:
        return tensors
    longest = max(tensor.shape[axis] for tensor in tensors)
    after = [0] * (2 * (tensors[0].dim() - axis - 1) + 1)  # of the axes behind this one, and before its beginning
    return [torch.nn.functional.pad(tensor, [*after, longest - tensor.shape[axis]]) for tensor in tensors]


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, on its way there: whatever uses it there waits for it."""
    return Batch(
        latents=_onto(batch.latents, device),
        noise=_onto(batch.noise, device),
        times=_onto(batch.times, device),
        conditioning={name: _onto(value, device) for name, value in batch.conditioning.items()},
        weights=_onto(batch.weights, device),
        names=batch.names,
        masks=None if batch.masks is None else _onto(batch.masks, device),
    )


def _onto(tensor: Tensor, device: torch.device) -> Tensor:
    """Only a copy from pinned memory does not wait for what the GPU was given before it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
