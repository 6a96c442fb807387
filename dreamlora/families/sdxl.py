"""Stable Diffusion XL and what was made of it: UNet, two CLIP text encoders, size and crop of every image as inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from dreamlora.families import _parts, _unet
from dreamlora.interfaces import (
    Classes,
    Components,
    Conditioning,
    Latents,
    ModelSource,
    Role,
    SampleDefaults,
    Settings,
    View,
)
from dreamlora.models import loading

PIPELINES: tuple[str, ...] = ("StableDiffusionXLPipeline",)
REFUSED: dict[str, str] = {
    "StableDiffusionXLImg2ImgPipeline": "the refiner of Stable Diffusion XL, or has its pipeline, which draws only the "
    "last steps of another model's images: give the base model"
}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        **dict.fromkeys(("tokenizer", "tokenizer_2"), _parts.CLIP_TOKENIZERS),
        "text_encoder": ("transformers.CLIPTextModel",),
        "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
    },
    "vae": {"vae": _parts.AUTOENCODERS},
    **_unet.PARTS,
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {"force_zeros_for_empty_prompt": True}
DENOISER: str = "unet"
SIDE_MULTIPLE: int = 8
TEXT_ENCODERS: tuple[str, ...] = ("text_encoder", "text_encoder_2")
EMBEDDING_KEYS: dict[str, str] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
LORA_LAYERS: tuple[str, ...] = _unet.LORA_LAYERS
LORA_PRESETS: dict[str, tuple[str, ...]] = _unet.LORA_PRESETS
TEXT_LORA_LAYERS: tuple[str, ...] = _parts.CLIP_LORA_LAYERS
PROMPT_LENGTH: str = "tokenizer_max_length"
PROMPT_DEFAULT: int | None = None
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {}
OWN_OPTIONS: tuple[str, ...] = _unet.OWN_OPTIONS

load = _parts.loader(PARTS, OPTIONAL, SETTINGS)
latent_size = _parts.latent_size
resolution = _unet.resolution
distilled = _parts.never_distilled
prompt_limit = _parts.clip_limit
count_tokens = _parts.count_tokens
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
encode_frozen = _parts.none_frozen
objective = _unet.objective
call_options = _parts.guided


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """Guidance as in the pipeline's own default, steps as most programs have them."""
    return SampleDefaults(num_inference_steps=30, guidance_scale=5.0)


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]``, and the same of the second tokenizer with "_2" behind.

    Raises:
        UserError: see ``prompt_limit``.
    """
    length = prompt_limit(text["tokenizer"], max_length)
    first = _parts.token_ids(text["tokenizer"], prompts, length)
    second = _parts.token_ids(text["tokenizer_2"], prompts, length)
    return {**first, **{f"{name}_2": ids for name, ids in second.items()}}


def encode_tokens(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D1 + D2]``, the last hidden states but one of both encoders, and
    ``pooled_prompt_embeds`` ``[B, P]`` of the second, as StableDiffusionXLPipeline.encode_prompt gives them.

    An empty caption is encoded like any other (so does kohya's caption dropout). Zeros in place of an empty *negative*
    prompt are the pipeline's affair: see ``negative_prompt``.
    """
    second = {name.removesuffix("_2"): ids for name, ids in tokens.items() if name.endswith("_2")}
    states, _ = _parts.clip_states(text["text_encoder"], text["tokenizer"], tokens, layer=-2)
    states_2, pooled = _parts.clip_states(text["text_encoder_2"], text["tokenizer_2"], second, layer=-2)
    assert pooled is not None  # this class has a projection
    return {"prompt_embeds": torch.cat([states, states_2], dim=-1), "pooled_prompt_embeds": pooled}


def encode_images(vae: Components, pixels: Tensor) -> Latents:
    """Moments of the latents of pixels ``[B, 3, H, W]`` in [-1, 1]; of autoencoders whose config has statistics of each
    channel (as Playground's) also by these, as StableDiffusionXLPipeline decodes them.
    """
    found, config = _parts.vae_latents(vae, pixels), vae["vae"].config
    statistics = [config.get(name) for name in ("latents_mean", "latents_std")]
    if None in statistics:
        return found
    mean, std = (torch.tensor(values, device=found.mean.device).view(-1, 1, 1) for values in statistics)
    return Latents(mean=(found.mean - mean * config.scaling_factor) / std, std=found.std / std)


def describe_views(views: Sequence[View]) -> Conditioning:
    """``time_ids`` ``[B, 6]``: original height and width, top and left of the crop, height and width of the crop
    (SDXL, arXiv 2307.01952, section 2.2); the last two as kohya has them, for squares as diffusers' script.
    """
    rows = [[*view.original[::-1], *view.corner[::-1], *view.size[::-1]] for view in views]
    return {"time_ids": torch.tensor(rows, dtype=torch.float32)}


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """ε or v ``[B, 4, h, w]``; ``guidance_scale`` is not used (no guidance embedding)."""
    dtype = _parts.dtype_of(denoiser)
    added = {
        "text_embeds": conditioning["pooled_prompt_embeds"].to(dtype),
        "time_ids": conditioning["time_ids"].to(dtype),
    }
    prompt = conditioning["prompt_embeds"].to(dtype)
    return denoiser(noisy.to(dtype), times, encoder_hidden_states=prompt, added_cond_kwargs=added).sample


def pipeline(components: Components) -> StableDiffusionXLPipeline:
    """A stock pipeline around these parts, without watermark; parts not given are None."""
    names = [name for role in PARTS.values() for name in role]
    zeros = components["settings"]["force_zeros_for_empty_prompt"]
    return StableDiffusionXLPipeline(
        **{name: components.get(name) for name in names}, force_zeros_for_empty_prompt=zeros, add_watermarker=False
    )


def negative_prompt(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """None where the pipeline itself puts zeros in place of a negative prompt that is not given."""
    zeros = loading.read_settings(source, SETTINGS)["force_zeros_for_empty_prompt"]
    return None if given is None and zeros else _parts.negative_above_one(source, guidance_scale, given)


def call_arguments(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Prompt embeddings for the pipeline's call, which says itself that an image is whole and of the size it draws."""
    arguments: dict[str, Any] = dict(conditioning)
    if negative is not None:
        arguments["negative_prompt_embeds"] = negative["prompt_embeds"]
        arguments["negative_pooled_prompt_embeds"] = negative["pooled_prompt_embeds"]
    return arguments
