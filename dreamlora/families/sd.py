"""Stable Diffusion 1.x and 2.x: UNet, one CLIP text encoder, noise or velocity prediction."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from dreamlora.families import _parts, _unet
from dreamlora.interfaces import (
    Classes,
    Components,
    Conditioning,
    ModelSource,
    Role,
    SampleDefaults,
    Settings,
)

PIPELINES: tuple[str, ...] = ("StableDiffusionPipeline",)
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": _parts.CLIP_TOKENIZERS,
        "text_encoder": ("transformers.CLIPTextModel",),
    },
    "vae": {"vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny", "diffusers.AsymmetricAutoencoderKL")},
    **_unet.PARTS,
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "unet"
SIDE_MULTIPLE: int = 8
TEXT_ENCODERS: tuple[str, ...] = ("text_encoder",)
EMBEDDING_KEYS: dict[str, str] = {"text_encoder": "emb_params"}
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
prompt_limit = _parts.clip_limit
encode_images = _parts.vae_latents
objective = _unet.objective
distilled = _parts.never_distilled
count_tokens = _parts.count_tokens
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
encode_frozen = _parts.none_frozen
describe_views = _parts.nothing_of_views
negative_prompt = _parts.negative_above_one
call_arguments = _parts.with_negative
call_options = _parts.guided


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """As most programs draw with these models."""
    return SampleDefaults(num_inference_steps=30, guidance_scale=7.5)


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
