"""Stable Diffusion 1.x and 2.x: UNet, one CLIP text encoder, noise or velocity prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.families import _parts
from dreamlora.interfaces import (
    Classes,
    Components,
    Conditioning,
    Latents,
    ModelSource,
    Role,
    SampleDefaults,
    Settings,
)
from dreamlora.models import loading
from dreamlora.objectives import Diffusion, training_loss

PIPELINES: tuple[str, ...] = ("StableDiffusionPipeline",)
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast"),
        "text_encoder": ("transformers.CLIPTextModel",),
    },
    "vae": {"vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny", "diffusers.AsymmetricAutoencoderKL")},
    "denoiser": {"unet": ("diffusers.UNet2DConditionModel",)},
    "scheduler": {"scheduler": _parts.DIFFUSION_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "unet"
SIDE_MULTIPLE: int = 8
TEXT_ENCODERS: tuple[str, ...] = ("text_encoder",)
LORA_LAYERS: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
TEXT_LORA_LAYERS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
PROMPT_LENGTH: str = "tokenizer_max_length"
PROMPT_DEFAULT: int | None = None
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {}
OWN_OPTIONS: tuple[str, ...] = (
    *("snr_gamma", "debiased_estimation_loss", "prediction_type", "rescale_betas_zero_snr"),
    *("negative_prompt", "tokenizer_max_length"),
)
LARGEST_SIDE = 1024
"""Of the latents that a UNet was made for: 64 and 96 in all known ones."""

latent_size = _parts.latent_size
distilled = _parts.never_distilled
count_tokens = _parts.count_tokens
encode_frozen = _parts.none_frozen
describe_views = _parts.nothing_of_views
negative_prompt = _parts.negative_above_one
call_arguments = _parts.with_negative
call_options = _parts.guided


def load(source: ModelSource, role: Role, dtype: Any) -> Components:
    """One part of the pipeline on the CPU, frozen, in eval mode.

    Raises:
        UserError: the folder or hub repository is missing, incomplete or holds pickles.
    """
    return loading.load_role(source, PARTS[role], dtype, OPTIONAL, SETTINGS)


def resolution(source: ModelSource) -> int:
    """The side the UNet was made for, in pixels (512 for SD 1.x, 768 for SD 2.x)."""
    side = loading.read_sizes(source, "unet", "sample_size", LARGEST_SIDE)[0]
    return side * _parts.pixels_per_latent(source)


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """As most programs draw with these models."""
    return SampleDefaults(num_inference_steps=30, guidance_scale=7.5)


def prompt_limit(tokenizer: Any, max_length: int | None) -> int:
    """Tokens that count of a prompt, begin and end included.

    Raises:
        UserError: more are asked for than the text encoder has positions, and not whole chunks of these.
    """
    return _parts.clip_limit(tokenizer, max_length)


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]``.

    Raises:
        UserError: see ``prompt_limit``.
    """
    return _parts.token_ids(text["tokenizer"], prompts, prompt_limit(text["tokenizer"], max_length))


def encode_tokens(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]``: the last hidden states, as StableDiffusionPipeline.encode_prompt gives them; of
    longer prompts those of their chunks.
    """
    return {"prompt_embeds": _parts.clip_states(text["text_encoder"], text["tokenizer"], tokens)[0]}


def encode_images(vae: Components, pixels: Tensor) -> Latents:
    """Moments of the latents of pixels ``[B, 3, H, W]`` in [-1, 1]."""
    return _parts.encode_images(vae["vae"], pixels)


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


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """ε or v ``[B, 4, h, w]``; ``guidance_scale`` is not used (no guidance embedding)."""
    dtype = _parts.dtype_of(denoiser)
    return denoiser(noisy.to(dtype), times, encoder_hidden_states=conditioning["prompt_embeds"].to(dtype)).sample


def pipeline(components: Components) -> StableDiffusionPipeline:
    """A stock pipeline around these parts, without safety checker; parts not given are None."""
    names = [name for role in PARTS.values() for name in role]
    return StableDiffusionPipeline(
        **{name: components.get(name) for name in names},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_lora(folder: Path, denoiser: nn.Module, text: Mapping[str, nn.Module]) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` as StableDiffusionPipeline.load_lora_weights reads it."""
    return _parts.save_lora(StableDiffusionPipeline, folder, {DENOISER: denoiser, **text})
