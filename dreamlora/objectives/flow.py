"""Rectified flow: straight ways from images to noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dreamlora.objectives.densities import Density, Uniform
from dreamlora.objectives.losses import TrainingLoss
from dreamlora.objectives.tensors import index, like

FlowWeighting = Literal["none", "sigma_sqrt", "cosmap"]


def unshifted(sides: tuple[int, int]) -> float:
    """The factor that leaves all times as they are."""
    return 1.0


@dataclass(frozen=True)
class Shift:
    """Times moved towards noise, as schedulers do it for large images: ``σ' = s σ / (1 + (s - 1) σ)``
    (arXiv 2403.03206, section 5.3.2).

    Attributes:
        factor: s for latents of these sides (h, w).
        terminal: what the last sigma, the least noise, becomes: all are stretched towards it; None leaves them.
    """

    factor: Callable[[tuple[int, int]], float] = unshifted
    terminal: float | None = None

    def __call__(self, sigmas: Tensor, last: Tensor, sides: tuple[int, int]) -> Tensor:
        """The sigmas ``[B]``, shifted.

        Args:
            sigmas: unshifted.
            last: the least of the unshifted grid.
            sides: of the latents.
        """
        s = self.factor(sides)
        shifted = s * sigmas / (1 + (s - 1) * sigmas)
        if self.terminal is None:
            return shifted
        clearest = s * last / (1 + (s - 1) * last)
        return 1 - (1 - shifted) * (1 - self.terminal) / (1 - clearest)


@dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow: ``x_σ = (1 - σ) x + σ ε``, target ``ε - x``; times are the sigmas themselves.

    Times are drawn as diffusers' SD3 and FLUX scripts do: a density gives a place on a grid of sigmas, which fall from
    1; then they are shifted.

    Attributes:
        sigmas: the grid ``[T]``, unshifted and falling, in (0, 1].
        density: of the places on it.
        shift: of what was drawn.
        weighting: of the loss.
        preconditioned: whether the loss is weighted by σ² besides, as diffusers' SD3 script does it: the error of the
            image that a prediction leads to is σ times its own.
        loss: how an error is counted.
    """

    sigmas: Tensor
    density: Density = field(default_factory=Uniform)
    shift: Shift = field(default_factory=Shift)
    weighting: FlowWeighting = "none"
    preconditioned: bool = False
    loss: TrainingLoss = field(default_factory=TrainingLoss)

    def draw_times(self, uniforms: Tensor, sides: tuple[int, int]) -> Tensor:
        """Sigmas from the first column of ``[B, 2]``."""
        places = self.density.places(uniforms[:, 0])
        grid = self.sigmas.to(places.device)
        return self.shift(grid[index(places, len(grid))], grid[-1], sides)

    def spread_times(self, positions: Tensor) -> Tensor:
        """The positions ``[n]`` in (0, 1) themselves: uniform in sigma, whatever density and shift."""
        return positions.float()

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """``x_σ``."""
        sigma = like(times, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity dx_σ/dσ."""
        return noise - latents

    def weight(self, times: Tensor) -> Tensor:
        """``σ⁻²`` for sigma_sqrt, ``2 / (π (1 - 2σ + 2σ²))`` for cosmap, else 1; and σ² if preconditioned."""
        weights = self._weighting(times)
        return weights * times.float() ** 2 if self.preconditioned else weights

    def errors(self, prediction: Tensor, target: Tensor, times: Tensor, masks: Tensor | None = None) -> Tensor:
        """See ``TrainingLoss.errors``: the way to noise is σ, the share of the signal 1 - σ."""
        return self.loss.errors(prediction, target, masks, lambda: (times.float(), 1 - times.float()))

    def _weighting(self, times: Tensor) -> Tensor:
        if self.weighting == "sigma_sqrt":
            return times.float() ** -2.0
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * times + 2 * times**2))
        return torch.ones(times.shape, dtype=torch.float32, device=times.device)
