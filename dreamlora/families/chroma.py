"""Chroma: FLUX.1's transformer without guidance and pooled prompts, T5 with its mask, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ChromaPipeline
from torch import Tensor, nn

from dreamlora.families import _chat, _flow, _flux, _packed, _parts
from dreamlora.interfaces import (
    Classes,
    Components,
    Conditioning,
    ModelSource,
    Role,
    SampleDefaults,
    Settings,
)
from dreamlora.objectives import RectifiedFlow, densities

PIPELINES: tuple[str, ...] = ("ChromaPipeline",)
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": _parts.T5_TOKENIZERS,
        "text_encoder": _flux.T5,
    },
    "vae": {"vae": _parts.AUTOENCODERS},
    "denoiser": {"transformer": ("diffusers.ChromaTransformer2DModel",)},
    "scheduler": {"scheduler": _parts.FLOW_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ()
EMBEDDING_KEYS: dict[str, str] = {}
LORA_LAYERS: tuple[str, ...] = _flux.LORA_LAYERS
LORA_PRESETS: dict[str, tuple[str, ...]] = _flux.LORA_PRESETS
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = 512
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {"prompt_embeds": 1, "prompt_attention_mask": 1}
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "negative_prompt", "max_sequence_length")

load = _parts.loader(PARTS, OPTIONAL, SETTINGS)
latent_size = _parts.latent_size
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
resolution = _flux.resolution
distilled = _parts.never_distilled  # Chroma1-Flash is, but its files do not tell
prompt_limit = _flux.prompt_limit
count_tokens = _parts.count_tokens
encode_images = _parts.vae_latents
describe_views = _parts.nothing_of_views
negative_prompt = _parts.negative_above_one
call_arguments = _parts.with_negative
call_options = _parts.guided


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """ChromaPipeline's own."""
    return SampleDefaults(num_inference_steps=35, guidance_scale=5.0)


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]``.

    Raises:
        UserError: see ``prompt_limit``.
    """
    return _parts.token_ids(text["tokenizer"], prompts, prompt_limit(text["tokenizer"], max_length))


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]`` and ``prompt_attention_mask`` ``[B, L]``, bool: of the tokens that count, and of
    one pad after them, which the transformer was trained to see.

    Numbers, which ChromaPipeline makes of prompts, would mask nothing: attention adds them (diffusers#13619).
    """
    if "prompt_embeds" in tokens:
        return {name: tokens[name] for name in LENGTH_AXES}
    t5 = text["text_encoder"]
    ids, mask = (tokens[name].to(_parts.bare(t5).device) for name in ("input_ids", "attention_mask"))
    states = t5(ids, attention_mask=mask, output_hidden_states=False)[0]
    seen = torch.arange(mask.shape[1], device=mask.device) <= mask.sum(dim=1, keepdim=True)
    embeds, counts = _chat.unpadded(states, seen)
    return {"prompt_embeds": embeds, "prompt_attention_mask": counts}


encode_tokens = encode_frozen  # T5 never trains


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow with times by a parabola that vanishes at both ends, unshifted: nearly OneTrainer's inverted
    parabola, its preset for Chroma.

    Raises:
        UserError: see ``_flow.objective``.
    """
    return _flow.objective(scheduler, train, shift="none", density=densities.beta(2, 2))


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is not used (no guidance embedding).

    Raises:
        UserError: h or w is odd.
    """
    dtype = _parts.dtype_of(denoiser)
    sides = (noisy.shape[2], noisy.shape[3])
    prompt, mask = conditioning["prompt_embeds"].to(dtype), conditioning["prompt_attention_mask"].bool()
    packed = _packed.pack(noisy.to(dtype))
    tokens = denoiser(
        hidden_states=packed,
        timestep=times.to(dtype),
        encoder_hidden_states=prompt,
        txt_ids=torch.zeros(prompt.shape[1], 3, device=noisy.device, dtype=dtype),
        img_ids=_packed.image_ids(sides[0] // 2, sides[1] // 2, noisy.device, dtype),
        attention_mask=torch.cat([mask, mask.new_ones(packed.shape[:2])], dim=1),
        return_dict=False,
    )[0]
    return _packed.unpack(tokens, sides)


def pipeline(components: Components) -> ChromaPipeline:
    """A stock pipeline around these parts, with masks of prompts that mask (see ``encode_frozen``); parts not given are
    None.
    """
    made = ChromaPipeline(**{name: components.get(name) for role in PARTS.values() for name in role})
    stock = made._get_t5_prompt_embeds

    def masked(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        embeds, numbers = stock(*args, **kwargs)
        return embeds, numbers.bool()

    made._get_t5_prompt_embeds = masked
    return made
