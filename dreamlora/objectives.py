"""Training objectives as pure functions: the times, the corruption, the target of the prediction and its weight.

Latents and noise are ``[B, C, h, w]``, times and weights ``[B]``. Nothing here draws a random number: times come from
uniform numbers that the caller draws (``randomness``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dreamlora.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")


def squared_errors(prediction: Tensor, target: Tensor, masks: Tensor | None = None) -> Tensor:
    """Mean squared error of every sample, in float32: two ``[B, C, h, w]`` of any precision give ``[B]``.

    Args:
        masks: ``[B, 1, h, w]`` in [0, 1]: the mean is weighted by it, so that a small subject counts as much as a large
            one. A sample whose mask is black has no error: there is nothing to learn of it.
    """
    squared = (prediction.float() - target.float()).square()
    if masks is None:
        return squared.flatten(1).mean(1)
    return (squared.mean(1, keepdim=True) * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1e-6)


def _like(values: Tensor, latents: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, 1, 1]`` in the latents' precision."""
    return values.to(latents.dtype).reshape(-1, *[1] * (latents.dim() - 1))


def _index(fractions: Tensor, length: int) -> Tensor:
    """Fractions of [0, 1) as int64 indices below ``length``; the clamp is for 1.0, which "mode" can give."""
    return (fractions * length).long().clamp_(0, length - 1)


@dataclass(frozen=True)
class Diffusion:
    """Denoising diffusion (DDPM): ``x_t = sqrt(ᾱ_t) x + sqrt(1 - ᾱ_t) ε``; times are int64 indices into ᾱ.

    Attributes:
        alphas_cumprod: ᾱ, ``[T]`` float32. Zero at the last time (zero terminal SNR) is fine.
        prediction_type: the target: ε, or ``v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x`` (arXiv 2202.00512).
        snr_gamma: γ of min-SNR weighting (arXiv 2303.09556); None weighs all times alike.

    Raises:
        UserError: the model predicts neither of the two.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    snr_gamma: float | None = None

    _on_devices: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTIONS:
            raise UserError(
                f"the model's scheduler says prediction_type {self.prediction_type!r}, which cannot be trained here: "
                f"it must be one of {', '.join(PREDICTIONS)}; --prediction_type overrides it"
            )

    def draw_times(self, uniforms: Tensor, sides: tuple[int, int]) -> Tensor:
        """Uniform times, from the first column of ``[B, 2]``; the same for all sides."""
        return _index(uniforms[:, 0], len(self.alphas_cumprod))

    def spread_times(self, positions: Tensor) -> Tensor:
        """Time index of every position ``[n]`` in (0, 1)."""
        return _index(positions, len(self.alphas_cumprod))

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """``x_t``."""
        signal, spread = self._scales(latents, times)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """ε or v."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._scales(latents, times)
        return signal * noise - spread * latents

    def weight(self, times: Tensor) -> Tensor:
        """Min-SNR weights: ``min(SNR, γ) / SNR`` for ε, ``min(SNR, γ) / (SNR + 1)`` for v.

        Written with ``SNR = ᾱ / (1 - ᾱ)`` put in, so that neither SNR = 0 nor SNR = ∞ gives NaN.
        """
        if self.snr_gamma is None:
            return torch.ones(times.shape, dtype=torch.float32, device=times.device)
        alpha = self._alpha(times)
        capped = self.snr_gamma * (1 - alpha)
        if self.prediction_type == "epsilon":
            return (capped / alpha).clamp(max=1.0)
        return torch.minimum(alpha, capped)

    def _alpha(self, times: Tensor) -> Tensor:
        """``ᾱ_t`` ``[B]``. ᾱ goes to a device once: each copy from the host would wait for all the device has to do."""
        if times.device not in self._on_devices:
            self._on_devices[times.device] = self.alphas_cumprod.to(times.device)
        return self._on_devices[times.device][times]

    def _scales(self, latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(times)
        return _like(alpha**0.5, latents), _like((1 - alpha) ** 0.5, latents)


@dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow: ``x_σ = (1 - σ) x + σ ε``, target ``ε - x``; times are the sigmas themselves.

    Times are drawn as diffusers' SD3 and FLUX scripts do: a density on (0, 1) (arXiv 2403.03206, section 3.1) gives an
    index into the scheduler's sigmas. They fall from 1, so a density that prefers small numbers prefers much noise; the
    scheduler's shift is in them.

    Attributes:
        sigmas: the scheduler's training sigmas ``[T]``, falling, in (0, 1].
        weighting_scheme: "logit_normal" and "mode" are densities of times; "sigma_sqrt" and "cosmap" are loss weights.
        logit_mean: mean of logit_normal.
        logit_std: standard deviation of logit_normal.
        mode_scale: s of "mode".
    """

    sigmas: Tensor
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def draw_times(self, uniforms: Tensor, sides: tuple[int, int]) -> Tensor:
        """Sigmas from the first column of ``[B, 2]``, by the inverse distribution function of logit_normal."""
        u = uniforms[:, 0]
        if self.weighting_scheme == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u.double()))
        elif self.weighting_scheme == "mode":
            u = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return self.sigmas.to(u.device)[_index(u, len(self.sigmas))]

    def spread_times(self, positions: Tensor) -> Tensor:
        """The positions ``[n]`` in (0, 1) themselves: uniform in sigma, whatever the scheduler's shift."""
        return positions.float()

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """``x_σ``."""
        sigma = _like(times, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity dx_σ/dσ."""
        return noise - latents

    def weight(self, times: Tensor) -> Tensor:
        """``σ⁻²`` for sigma_sqrt, ``2 / (π (1 - 2σ + 2σ²))`` for cosmap, else 1."""
        if self.weighting_scheme == "sigma_sqrt":
            return times.float() ** -2.0
        if self.weighting_scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * times + 2 * times**2))
        return torch.ones(times.shape, dtype=torch.float32, device=times.device)
