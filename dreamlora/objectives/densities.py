"""Densities of the training times of rectified flows: uniform numbers in, places on the way from noise to image out.

Place 0 is noise (σ = 1) and 1 the image, as in diffusers' scripts, which take places as indices of sigmas that fall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Density(Protocol):
    """A distribution of places, by its inverse distribution function."""

    def places(self, uniforms: Tensor) -> Tensor:
        """Places ``[B]`` in [0, 1] of numbers ``[B]`` that are uniform in (0, 1)."""


@dataclass(frozen=True)
class Uniform:
    """All places alike."""

    def places(self, uniforms: Tensor) -> Tensor:
        """The numbers themselves."""
        return uniforms


@dataclass(frozen=True)
class LogitNormal:
    """The sigmoid of a normal (arXiv 2403.03206, section 3.1); a mean above 0 prefers clear images."""

    mean: float = 0.0
    std: float = 1.0

    def places(self, uniforms: Tensor) -> Tensor:
        """``sigmoid(mean + std Φ⁻¹(u))``."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniforms.double()))


@dataclass(frozen=True)
class Mode:
    """The paper's density with heavy tails; a scale above 0 prefers the middle."""

    scale: float = 1.29

    def places(self, uniforms: Tensor) -> Tensor:
        """``1 - u - s (cos²(π u / 2) - 1 + u)``; rounding can leave [0, 1]."""
        return 1 - uniforms - self.scale * (torch.cos(math.pi * uniforms / 2) ** 2 - 1 + uniforms)


@dataclass(frozen=True)
class Tabulated:
    """A density of σ by points of its distribution function, straight in between.

    Attributes:
        sigmas: ascending from 0 (image) to 1 (noise).
        cumulative: share of the times below each, ascending from 0 to 1.
    """

    sigmas: np.ndarray = field(repr=False)
    cumulative: np.ndarray = field(repr=False)

    def places(self, uniforms: Tensor) -> Tensor:
        """``1 - σ``: small numbers are much noise, as in the others."""
        sigmas = np.interp(1 - uniforms.double().cpu().numpy(), self.cumulative, self.sigmas)
        return torch.from_numpy(1 - sigmas).to(uniforms.device)


def table(shares: Sequence[float]) -> Tabulated:
    """The density whose parts of equal width in σ, from image to noise, have these shares of the times."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(shares, dtype=np.float64))])
    return Tabulated(np.linspace(0, 1, len(total)), total / total[-1])


BETA_POINTS = 20_001
"""Of the integral: errors stay far below the width of one of a thousand sigmas."""


def beta(a: float, b: float) -> Tabulated:
    """σ by the beta distribution: a mean of ``a / (a + b)``; 1, 1 is uniform.

    With σ = sigmoid(z) its density in z is ``σᵃ (1 - σ)ᵇ`` up to a factor: smooth, and vanishing at both ends for all a
    and b, so that plain sums integrate it well.
    """
    reach = 40 / min(a, b, 1.0)
    z = np.linspace(-reach, reach, BETA_POINTS)
    logarithm = -a * np.logaddexp(0, -z) - b * np.logaddexp(0, z)
    density = np.exp(logarithm - logarithm.max())
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return Tabulated(1 / (1 + np.exp(-np.clip(z, -700, 700))), total / total[-1])
