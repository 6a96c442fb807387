"""FLUX.1, Kontext: transformer over packed latents, CLIP (pooled) and T5 as text encoders, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from torch import Tensor, nn

from dreamlora.families import _flow, _flux, _packed, _parts
from dreamlora.interfaces import (
    Classes,
    Components,
    Conditioning,
    ModelSource,
    Role,
    SampleDefaults,
    Settings,
)
from dreamlora.models import loading
from dreamlora.objectives import RectifiedFlow

PIPELINES: tuple[str, ...] = ("FluxPipeline", "FluxKontextPipeline")
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": _parts.CLIP_TOKENIZERS,
        "tokenizer_2": _parts.T5_TOKENIZERS,
        "text_encoder": ("transformers.CLIPTextModel",),
        "text_encoder_2": _flux.T5,
    },
    "vae": {"vae": _parts.AUTOENCODERS},
    "denoiser": {"transformer": ("diffusers.FluxTransformer2DModel",)},
    "scheduler": {"scheduler": _parts.FLOW_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ("text_encoder",)
EMBEDDING_KEYS: dict[str, str] = {"text_encoder": "clip_l"}
LORA_LAYERS: tuple[str, ...] = _flux.LORA_LAYERS
LORA_PRESETS: dict[str, tuple[str, ...]] = _flux.LORA_PRESETS
TEXT_LORA_LAYERS: tuple[str, ...] = _parts.CLIP_LORA_LAYERS
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = 512
PROMPT_TOKENIZER: str = "tokenizer_2"
LENGTH_AXES: dict[str, int] = {}  # T5's padding is attended, so it is a part of the model
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "guidance_scale", "max_sequence_length")

load = _parts.loader(PARTS, OPTIONAL, SETTINGS)
latent_size = _parts.latent_size
resolution = _flux.resolution
prompt_limit = _flux.prompt_limit
encode_images = _parts.vae_latents
count_tokens = _parts.count_tokens
encode_conditioning = _packed.conditioning
text_pictures = _parts.no_text_pictures
describe_views = _parts.nothing_of_views
negative_prompt = _parts.never_negative
call_options = _parts.guided


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """FluxPipeline's own; schnell was distilled to four steps."""
    if distilled(source):
        return SampleDefaults(num_inference_steps=4, guidance_scale=0.0)
    return SampleDefaults(num_inference_steps=28, guidance_scale=3.5)


def distilled(source: ModelSource) -> str | None:
    """schnell alone has no guidance embedding."""
    if loading.read_config(source, DENOISER).get("guidance_embeds"):
        return None
    return (
        "FLUX.1-schnell was distilled to four steps: train FLUX.1-dev instead, or with --training_adapter "
        "ostris/FLUX.1-schnell-training-adapter"
    )


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` ``[B, 77]`` for CLIP and ``input_ids_2`` ``[B, L]`` for T5; ``max_length`` is T5's.

    CLIP's summary of the prompt is of its beginning, as in FluxPipeline.

    Raises:
        UserError: see ``prompt_limit``.
    """
    length = prompt_limit(text["tokenizer_2"], max_length)
    clip = _parts.token_ids(text["tokenizer"], prompts, text["tokenizer"].model_max_length)
    t5 = _parts.token_ids(text["tokenizer_2"], prompts, length)
    return {"input_ids": clip["input_ids"], "input_ids_2": t5["input_ids"]}


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]`` (T5) in place of ``input_ids_2``."""
    t5 = text["text_encoder_2"]
    embeds = t5(tokens["input_ids_2"].to(_parts.bare(t5).device), output_hidden_states=False)[0]
    return {"input_ids": tokens["input_ids"], "prompt_embeds": embeds}


def encode_tokens(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]`` (T5) and ``pooled_prompt_embeds`` ``[B, P]`` (CLIP), as FluxPipeline has them."""
    clip = text["text_encoder"]
    if "prompt_embeds" not in tokens:
        tokens = encode_frozen(text, tokens)
    pooled = clip(tokens["input_ids"].to(_parts.bare(clip).device), output_hidden_states=False).pooler_output
    return {"prompt_embeds": tokens["prompt_embeds"], "pooled_prompt_embeds": pooled}


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow, unshifted unless asked for: diffusers' script takes a fresh scheduler's sigmas, and dynamic
    shifting is not in them.

    Raises:
        UserError: see ``_flow.objective``.
    """
    return _flow.objective(scheduler, train, shift="none")


def shows_images(source: ModelSource) -> bool:
    """Kontext does."""
    return bool(loading.read_settings(source, SETTINGS)["_class_name"] == "FluxKontextPipeline")


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is FLUX.1-dev's guidance embedding.

    Raises:
        UserError: h or w is odd.
    """
    dtype = _parts.dtype_of(denoiser)
    sides = (noisy.shape[2], noisy.shape[3])
    prompt = conditioning["prompt_embeds"].to(dtype)
    guidance = (
        torch.full((len(noisy),), guidance_scale, device=noisy.device)
        if _parts.bare(denoiser).config.guidance_embeds
        else None
    )
    tokens, ids = _packed.pack(noisy.to(dtype)), _packed.image_ids(sides[0] // 2, sides[1] // 2, noisy.device, dtype)
    packed = denoiser(
        hidden_states=_packed.with_conditioning(tokens, conditioning),
        timestep=times.to(dtype),
        guidance=guidance,
        pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
        encoder_hidden_states=prompt,
        txt_ids=torch.zeros(prompt.shape[1], 3, device=noisy.device, dtype=dtype),
        img_ids=_packed.ids_with_conditioning(ids, conditioning),
        return_dict=False,
    )[0]
    return _packed.unpack(packed[:, : tokens.shape[1]], sides)


def pipeline(components: Components) -> Any:
    """A stock pipeline of the class that the model names around these parts; parts not given are None."""
    kontext = components["settings"]["_class_name"] == "FluxKontextPipeline"
    pipeline_class = FluxKontextPipeline if kontext else FluxPipeline
    return pipeline_class(**{name: components.get(name) for role in PARTS.values() for name in role})


def call_arguments(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Prompt embeddings for the pipeline's call."""
    return dict(conditioning)
