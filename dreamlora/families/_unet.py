"""What families with a UNet share: its classes, its schedule over betas, its objective."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler

from dreamlora.errors import UserError
from dreamlora.families import _parts
from dreamlora.interfaces import Classes, ModelSource, Role
from dreamlora.models import loading
from dreamlora.objectives import Diffusion, training_loss

SCHEDULERS: Classes = tuple(
    f"diffusers.{name}Scheduler"
    for name in (
        *("DDIM", "DDPM", "PNDM", "LCM", "TCD", "DEISMultistep", "UniPCMultistep", "SASolver"),
        *("DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "EulerDiscrete", "EulerAncestralDiscrete"),
        *("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete"),
    )
)
"""Those over betas, whose configs give DDPM's: any of them samples from a Stable Diffusion."""
PARTS: dict[Role, dict[str, Classes]] = {
    "denoiser": {"unet": ("diffusers.UNet2DConditionModel",)},
    "scheduler": {"scheduler": SCHEDULERS},
}
LORA_LAYERS: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(LORA_LAYERS, ["ff.net.0.proj", "ff.net.2"])
OWN_OPTIONS: tuple[str, ...] = (
    *("snr_gamma", "debiased_estimation_loss", "prediction_type", "rescale_betas_zero_snr"),
    *("negative_prompt", "tokenizer_max_length"),
)
LARGEST_SIDE = 1024
"""Of the latents that a UNet was made for: 64, 96 and 128 in all known ones."""


def resolution(source: ModelSource) -> int:
    """The side the UNet was made for, in pixels (512 for SD 1.x, 768 for SD 2.x, 1024 for SDXL)."""
    side = loading.read_sizes(source, "unet", "sample_size", LARGEST_SIDE)[0]
    return side * _parts.pixels_per_latent(source)


def objective(scheduler: Any, train: Any) -> Diffusion:
    """Diffusion over the scheduler's ᾱ; DDPM's class computes it, whatever sampler the pipeline comes with.

    Raises:
        UserError: the scheduler's prediction_type is neither epsilon nor v_prediction; or zero terminal SNR is asked
            for with epsilon; or see ``Diffusion``.
    """
    prediction_type = train.prediction_type or scheduler.config.prediction_type
    if train.rescale_betas_zero_snr and prediction_type == "epsilon":
        raise UserError(
            "--rescale_betas_zero_snr is for models that predict v: pure noise tells nothing of its own noise, and no "
            "image can be drawn from it with epsilon. Give --prediction_type v_prediction too, or leave it out"
        )
    zero_snr = {"rescale_betas_zero_snr": True} if train.rescale_betas_zero_snr else {}
    return Diffusion(
        alphas_cumprod=DDPMScheduler.from_config(scheduler.config, **zero_snr).alphas_cumprod,
        prediction_type=prediction_type,
        snr_gamma=train.snr_gamma,
        debiased=train.debiased_estimation_loss,
        loss=training_loss(train),
    )
