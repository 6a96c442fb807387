"""Denoising diffusion over a scheduler's noise levels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.objectives.losses import TrainingLoss
from dreamlora.objectives.tensors import index, like

PREDICTIONS = ("epsilon", "v_prediction")
HIGHEST_SNR = 1000.0
"""That debiased estimation divides by: the first times of a schedule have nearly no noise."""


@dataclass(frozen=True)
class Diffusion:
    """Denoising diffusion (DDPM): ``x_t = sqrt(ᾱ_t) x + sqrt(1 - ᾱ_t) ε``; times are int64 indices into ᾱ.

    Attributes:
        alphas_cumprod: ᾱ, ``[T]`` float32. Zero at the last time (zero terminal SNR) is fine.
        prediction_type: the target: ε, or ``v = sqrt(ᾱ) ε - sqrt(1 - ᾱ) x`` (arXiv 2202.00512).
        snr_gamma: γ of min-SNR weighting (arXiv 2303.09556); None weighs all times alike.
        debiased: whether to weigh by debiased estimation instead (arXiv 2310.08442).
        loss: how an error is counted.

    Raises:
        UserError: the model predicts neither of the two; or both weightings are asked for, or one that is infinite.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    snr_gamma: float | None = None
    debiased: bool = False
    loss: TrainingLoss = field(default_factory=TrainingLoss)

    _on_devices: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTIONS:
            raise UserError(
                f"the model's scheduler says prediction_type {self.prediction_type!r}, which cannot be trained here: "
                f"it must be one of {', '.join(PREDICTIONS)}; --prediction_type overrides it"
            )
        if self.debiased and self.snr_gamma is not None:
            raise UserError("give either --snr_gamma or --debiased_estimation_loss: both weigh the times of a loss")
        if self.debiased and self.prediction_type == "epsilon" and not self.alphas_cumprod.all():
            raise UserError(
                "--debiased_estimation_loss divides by the signal-to-noise ratio, which is zero at the end of this "
                "model's schedule (rescale_betas_zero_snr): leave it out, or is it a model that predicts v "
                "(--prediction_type v_prediction)?"
            )

    def draw_times(self, uniforms: Tensor, sides: tuple[int, int]) -> Tensor:
        """Uniform times, from the first column of ``[B, 2]``; the same for all sides."""
        return index(uniforms[:, 0], len(self.alphas_cumprod))

    def spread_times(self, positions: Tensor) -> Tensor:
        """Time index of every position ``[n]`` in (0, 1)."""
        return index(positions, len(self.alphas_cumprod))

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
        """Weights of ε and v: min-SNR ``min(SNR, γ) / SNR`` and ``min(SNR, γ) / (SNR + 1)``; debiased ``SNR^-½`` and
        ``1 / (SNR + 1)``, with at most 1000 for the SNR as in kohya's sd-scripts.

        Written with ``SNR = ᾱ / (1 - ᾱ)`` put in, so that neither SNR = 0 nor SNR = ∞ gives NaN.
        """
        alpha = self._alpha(times)
        if self.debiased:
            alpha = alpha.clamp(max=HIGHEST_SNR / (HIGHEST_SNR + 1))
            return ((1 - alpha) / alpha).sqrt() if self.prediction_type == "epsilon" else 1 - alpha
        if self.snr_gamma is None:
            return torch.ones(times.shape, dtype=torch.float32, device=times.device)
        capped = self.snr_gamma * (1 - alpha)
        if self.prediction_type == "epsilon":
            return (capped / alpha).clamp(max=1.0)
        return torch.minimum(alpha, capped)

    def errors(self, prediction: Tensor, target: Tensor, times: Tensor, masks: Tensor | None = None) -> Tensor:
        """See ``TrainingLoss.errors``: the way to noise is the share of the time steps."""
        return self.loss.errors(prediction, target, masks, lambda: self._noisiness(times))

    def _noisiness(self, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(times)
        signal, spread = alpha**0.5, (1 - alpha) ** 0.5
        return times / len(self.alphas_cumprod), signal / (signal + spread)

    def _alpha(self, times: Tensor) -> Tensor:
        """``ᾱ_t`` ``[B]``. ᾱ goes to a device once: each copy from the host would wait for all the device has to do."""
        if times.device not in self._on_devices:
            self._on_devices[times.device] = self.alphas_cumprod.to(times.device)
        return self._on_devices[times.device][times]

    def _scales(self, latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(times)
        return like(alpha**0.5, latents), like((1 - alpha) ** 0.5, latents)
