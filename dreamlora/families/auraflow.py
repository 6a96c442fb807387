"""AuraFlow and what was made of it (Pony V7): transformer over learned positions, UMT5 as the text encoder, rectified
flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffusers import AuraFlowPipeline
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.families import _flow, _parts
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

PIPELINES: tuple[str, ...] = ("AuraFlowPipeline",)
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": tuple(
            f"transformers.{name}"
            for name in ("LlamaTokenizerFast", "LlamaTokenizer", "T5TokenizerFast", "T5Tokenizer")
        ),
        "text_encoder": ("transformers.UMT5EncoderModel",),
    },
    "vae": {"vae": _parts.AUTOENCODERS},
    "denoiser": {"transformer": ("diffusers.AuraFlowTransformer2DModel",)},
    "scheduler": {"scheduler": _parts.FLOW_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ()
EMBEDDING_KEYS: dict[str, str] = {}
LORA_LAYERS: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(
    [*LORA_LAYERS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    [f"{ff}.{layer}" for ff in ("ff", "ff_context") for layer in ("linear_1", "linear_2", "out_projection")],
)
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = 256
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {}  # padding is attended, as zeros, so it is a part of the model
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "negative_prompt", "max_sequence_length")

LARGEST_SIDE = 1024
"""Of the latents that a transformer was made for: 64 and 128 in all known ones."""

load = _parts.loader(PARTS, OPTIONAL, SETTINGS)
pipeline = _parts.pipeline_of(AuraFlowPipeline, PARTS)
latent_size = _parts.latent_size
encode_images = _parts.vae_latents
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
prompt_limit = _parts.prompts_up_to(256)  # what the pipeline gives the model unless told otherwise, end included
count_tokens = _parts.count_tokens
describe_views = _parts.nothing_of_views
distilled = _parts.never_distilled
negative_prompt = _parts.negative_above_one
call_options = _parts.guided


def resolution(source: ModelSource) -> int:
    """AuraFlowPipeline's default side: what the transformer was made for."""
    side = loading.read_sizes(source, DENOISER, "sample_size", LARGEST_SIDE)[0]
    return side * _parts.pixels_per_latent(source)


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """AuraFlowPipeline's own."""
    return SampleDefaults(num_inference_steps=50, guidance_scale=3.5)


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]``.

    Raises:
        UserError: see ``prompt_limit``.
    """
    return _parts.token_ids(text["tokenizer"], prompts, prompt_limit(text["tokenizer"], max_length))


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]``, those of padding being zero, as AuraFlowPipeline.encode_prompt gives them."""
    if "prompt_embeds" in tokens:
        return {"prompt_embeds": tokens["prompt_embeds"]}
    encoder = text["text_encoder"]
    ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    return {"prompt_embeds": encoder(input_ids=ids, attention_mask=mask)[0] * mask[..., None]}


encode_tokens = encode_frozen  # the text encoder never trains: the pipeline's files have no place for its LoRA


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow over the sigmas of the model's scheduler, shift included.

    Raises:
        UserError: see ``_flow.objective``.
    """
    return _flow.objective(scheduler, train, shift="scheduler")


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is not used (no guidance embedding).

    Raises:
        UserError: h or w is odd (the transformer sees patches of 2 x 2 latents), or more than it has positions for: it
            would take those of other places.
    """
    height, width = noisy.shape[-2:]
    config = _parts.bare(denoiser).config
    most = math.isqrt(config.pos_embed_max_size) * config.patch_size
    if height % 2 or width % 2 or max(height, width) > most:
        raise UserError(
            f"this AuraFlow needs images whose sides are multiples of 16 and at most {8 * most} pixels "
            f"(got latents of {height} x {width}): give a smaller --resolution, or leave --buckets out"
        )
    dtype = _parts.dtype_of(denoiser)
    velocity: Tensor = denoiser(
        noisy.to(dtype).contiguous(),
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        timestep=times.to(dtype),
        return_dict=False,
    )[0]
    return velocity


def call_arguments(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Prompt embeddings for the pipeline's call, which wants masks besides, and does not look at them."""
    return _parts.with_negative(_masked(conditioning), None if negative is None else _masked(negative))


def _masked(conditioning: Conditioning) -> Conditioning:
    embeds = conditioning["prompt_embeds"]
    return {"prompt_embeds": embeds, "prompt_attention_mask": embeds.new_ones(embeds.shape[:2])}
