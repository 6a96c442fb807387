"""Lumina-Image 2.0: transformer over captions of any length, Gemma 2 as the text encoder, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import Lumina2Pipeline
from torch import Tensor, nn

from dreamlora.families import _chat, _flow, _packed, _parts
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

PIPELINES: tuple[str, ...] = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": _chat.GEMMA,
    "vae": {"vae": _parts.AUTOENCODERS},
    "denoiser": {"transformer": ("diffusers.Lumina2Transformer2DModel",)},
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
    LORA_LAYERS, ["feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"]
)
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = 256
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {"prompt_embeds": 1, "prompt_attention_mask": 1}
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "negative_prompt", "max_sequence_length")

INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
"""What Lumina2Pipeline puts before prompts, unless told otherwise."""
LONGEST_PROMPT = 256
"""Tokens that the pipeline takes unless told otherwise. The transformer has places for 300."""
LAYER = -2
"""Whose states are the embeddings: the last but one, before the norm."""
PIXELS_PER_LATENT = 8
"""Whatever the autoencoder: Lumina2Pipeline takes it to be so."""
LARGEST_SIDE = 1024
"""Of the latents that a transformer was made for: 128 in all known ones."""

load = _parts.loader(PARTS, OPTIONAL, SETTINGS)
pipeline = _parts.pipeline_of(Lumina2Pipeline, PARTS)
latent_size = _parts.latent_size
encode_images = _parts.vae_latents
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
prompt_limit = _parts.prompts_up_to(LONGEST_PROMPT)  # begin and instruction included
describe_views = _parts.nothing_of_views
distilled = _parts.never_distilled
negative_prompt = _chat.marked_negative
call_arguments = _chat.with_negative
call_options = _parts.guided


def resolution(source: ModelSource) -> int:
    """Lumina2Pipeline's default side: what the transformer was made for."""
    return PIXELS_PER_LATENT * loading.read_sizes(source, DENOISER, "sample_size", LARGEST_SIDE)[0]


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """Lumina2Pipeline's own."""
    return SampleDefaults(num_inference_steps=30, guidance_scale=4.0)


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """See ``Family.count_tokens``."""
    return _parts.count_tokens(tokenizer, _texts(prompts))


def _texts(prompts: Sequence[str]) -> list[str]:
    """What Gemma reads."""
    mark = _chat.NEGATIVE
    return [prompt.removeprefix(mark) if prompt.startswith(mark) else INSTRUCTION + prompt for prompt in prompts]


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]`` of the instruction and the prompt.

    Raises:
        UserError: see ``prompt_limit``.
    """
    tokenizer = text["tokenizer"]
    tokenizer.padding_side = "right"  # as the pipeline has it
    return _parts.token_ids(tokenizer, _texts(prompts), prompt_limit(tokenizer, max_length))


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]`` and ``prompt_attention_mask`` ``[B, L]``, without the padding that all have."""
    if "prompt_embeds" in tokens:
        return {name: tokens[name] for name in LENGTH_AXES}
    [states] = _chat.layer_states(text["text_encoder"], tokens, [LAYER])
    embeds, mask = _chat.unpadded(states, tokens["attention_mask"])
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


encode_tokens = encode_frozen  # the text encoder never trains: the pipeline's files have no place for its LoRA


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow over the sigmas of the model's scheduler, whose shift of 6 prefers much noise.

    diffusers' script draws from the same sigmas but takes 1 to be the image: it trains almost without noise.

    Raises:
        UserError: see ``_flow.objective``.
    """
    return _flow.objective(scheduler, train, shift="scheduler")


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is not used (no guidance embedding).

    The transformer counts time from noise to image, and gives the velocity that way.

    Raises:
        UserError: h or w is odd (the transformer sees patches of 2 x 2 latents).
    """
    _packed.require_patches(noisy)
    dtype = _parts.dtype_of(denoiser)
    towards_image: Tensor = denoiser(
        hidden_states=noisy.to(dtype).contiguous(),
        timestep=1 - times,
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        encoder_attention_mask=conditioning["prompt_attention_mask"],
        return_dict=False,
    )[0]
    return -towards_image
