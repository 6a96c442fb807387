"""Deterministic evaluation loss: the training objective on frozen items (image, time, noise).

The loss of a training step is mostly the noise of its random times. Measured on the same items at every step, and in
every run, differences between checkpoints and optimizers of a fraction of a percent become visible.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamlora.interfaces import Conditioning, Objective
from dreamlora.randomness import generator

CURVE_ITEMS = 64
MIN_TIMES = 8

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy latents, times, conditioning) -> prediction, all batch first."""


@dataclass(frozen=True)
class EvalSet:
    """Frozen items. Item ``k`` is image ``image[k]`` at ``times[k]`` with noise of its own.

    Attributes:
        latents: ``[images, C, h, w]`` float32, means of the posterior.
        captions: one per image.
        image: ``[items]`` int64.
        times: ``[items]``, as the objective takes them.
        position: ``[items]`` float32 in (0, 1): how far along the schedule, whatever its units.
        noise_keys: one per item, for ``randomness.generator``.
        id: hash of all of the above and of the model; values with different ids must not be compared.
    """

    latents: Tensor
    captions: tuple[str, ...]
    image: Tensor
    times: Tensor
    position: Tensor
    noise_keys: tuple[str, ...]
    id: str

    def noise(self, items: Sequence[int]) -> Tensor:
        """``[len(items), C, h, w]`` float32; drawn anew each time, so that it need not be stored."""
        shape = self.latents.shape[1:]
        return torch.stack([torch.randn(shape, generator=generator(self.noise_keys[item])) for item in items])


def build_eval_set(
    latents: Tensor, captions: Sequence[str], names: Sequence[str], objective: Objective, *, seed: int, model_id: str
) -> EvalSet:
    """Spread about 64 items evenly over images and times.

    Times are midpoints of equal bins, shifted from image to image (a Latin design), so that together the images cover
    the whole schedule.

    Args:
        latents: ``[images, C, h, w]`` means of the posterior.
        captions: one per image.
        names: stable identity of every image (its content hash): decides the noise.
        objective: maps positions to times.
        seed: of the noises; runs that are compared share it.
        model_id: of the base model, for the set's id.
    """
    n_images = len(latents)
    n_times = max(MIN_TIMES, -(-CURVE_ITEMS // n_images))
    image = torch.arange(n_images).repeat_interleave(n_times)
    bins = torch.arange(n_times).repeat(n_images)
    shift = (image + 0.5) / n_images  # in bins; 0.5 is the plain midpoint of a single image
    position = ((bins + shift) / n_times).to(torch.float32)
    times = objective.spread_times(position)
    keys = tuple(f"{seed}/{names[i]}/{j}" for i, j in zip(image.tolist(), bins.tolist(), strict=True))
    digest = hashlib.sha256(repr((keys, tuple(captions), model_id, times.tolist())).encode())
    digest.update(latents.contiguous().numpy().tobytes())
    return EvalSet(latents, tuple(captions), image, times, position, keys, digest.hexdigest()[:16])


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Attributes:
        predict: the model in eval mode.
        objective: of its training.
        conditioning: captions to batched conditioning on ``device``.
        device: of the model.
    """

    predict: Predict
    objective: Objective
    conditioning: Callable[[Sequence[str]], Conditioning]
    device: torch.device


@torch.no_grad()
def evaluate_loss(
    model: Measured, items: EvalSet, *, batch_size: int, rank: int = 0, world: int = 1
) -> dict[int, float]:
    """Mean squared error of every item, unweighted, in float32.

    Args:
        model: what is measured.
        items: what to measure on.
        batch_size: items per forward pass; does not change the values beyond rounding.
        rank: this process evaluates items ``rank, rank + world, ...``.
        world: number of processes.

    Returns:
        Loss by item number.
    """
    mine = range(rank, len(items.times), world)
    losses: dict[int, float] = {}
    for start in range(0, len(mine), batch_size):
        chunk = list(mine[start : start + batch_size])
        image = items.image[chunk]
        latents = items.latents[image].to(model.device)
        noise = items.noise(chunk).to(model.device)
        times = items.times[chunk].to(model.device)
        noisy = model.objective.corrupt(latents, noise, times)
        prediction = model.predict(noisy, times, model.conditioning([items.captions[i] for i in image.tolist()]))
        target = model.objective.target(latents, noise, times)
        error = (prediction.float() - target.float()).square().flatten(1).mean(1)
        losses.update(zip(chunk, error.tolist(), strict=True))
    return losses
