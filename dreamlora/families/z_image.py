"""Z-Image and Z-Image-Turbo: transformer over captions of any length, Qwen3 as the text encoder, rectified flow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
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

PIPELINES: tuple[str, ...] = ("ZImagePipeline",)
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": _chat.QWEN_TOKENIZERS,
        "text_encoder": ("transformers.Qwen3Model", "transformers.Qwen3ForCausalLM"),
    },
    "vae": {"vae": _parts.AUTOENCODERS},
    "denoiser": {"transformer": ("diffusers.ZImageTransformer2DModel",)},
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
    LORA_LAYERS, ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
)
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = 512
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {"prompt_embeds": 1, "prompt_embeds_mask": 1}
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "negative_prompt", "max_sequence_length")

LONGEST_PROMPT = 512
"""Tokens that the model was trained with at most, the marks of the chat included."""
LAYER = -2
"""Whose states are the embeddings: the last but one, before the norm."""
TURBO_SHIFT = 3.0
"""Of its scheduler; the base model's is 6."""
_TURBO = re.compile(r"((?<![a-z])de[-_. ]?)?turbo", re.IGNORECASE)

pipeline = _parts.pipeline_of(ZImagePipeline, PARTS)
latent_size = _parts.latent_size
encode_images = _parts.vae_latents
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
prompt_limit = _parts.prompts_up_to(LONGEST_PROMPT)
describe_views = _parts.nothing_of_views
call_options = _parts.guided


def load(source: ModelSource, role: Role, dtype: Any) -> Components:
    """One part of the pipeline on the CPU, frozen, in eval mode.

    Raises:
        UserError: the folder or hub repository is missing, incomplete or holds pickles.
    """
    return _chat.with_template(loading.load_role(source, PARTS[role], dtype, OPTIONAL, SETTINGS), _chat.QWEN)


def resolution(source: ModelSource) -> int:
    """ZImagePipeline's default side."""
    return 1024


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """ZImagePipeline's own; Turbo's as its authors have them, without guidance (0 here, not 1)."""
    if distilled(source):
        return SampleDefaults(num_inference_steps=9, guidance_scale=0.0)
    return SampleDefaults(num_inference_steps=50, guidance_scale=5.0)


def distilled(source: ModelSource) -> str | None:
    """Turbo by its name, or that of the model it was made from; where no name tells, by its scheduler's shift."""
    if not _is_turbo(source):
        return None
    return (
        "Z-Image-Turbo was distilled to few steps: train Z-Image (Tongyi-MAI/Z-Image), whose LoRAs Turbo takes as "
        "well, or with --training_adapter ostris/zimage_turbo_training_adapter"
    )


def _is_turbo(source: ModelSource) -> bool:
    place = Path(source.path)
    cached = (part for part in place.parts if part.startswith("models--"))  # a folder of the hub's cache is a number
    for name in (place.name, *cached, str(loading.read_model_index(source).get("_name_or_path"))):
        if said := _TURBO.search(name):
            return not said[1]  # "De-Turbo" has been undistilled
    config = loading.read_config(source, "scheduler")
    return not config.get("use_dynamic_shifting") and config.get("shift") == TURBO_SHIFT


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """See ``Family.count_tokens``."""
    return _chat.count_tokens(tokenizer, _chat.QWEN, prompts)


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]`` of each prompt as a user's turn.

    Raises:
        UserError: see ``prompt_limit``.
    """
    tokenizer = text["tokenizer"]
    chats = _chat.as_chats(tokenizer, _chat.QWEN, prompts)
    return _parts.token_ids(tokenizer, chats, prompt_limit(tokenizer, max_length))


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]`` and ``prompt_embeds_mask`` ``[B, L]``, of real tokens alone: the model has
    padding of its own.
    """
    if "prompt_embeds" in tokens:
        return {name: tokens[name] for name in LENGTH_AXES}
    [states] = _chat.layer_states(text["text_encoder"], tokens, [LAYER])
    embeds, mask = _chat.unpadded(states, tokens["attention_mask"])
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


encode_tokens = encode_frozen  # the text encoder never trains: the pipeline's files have no place for its LoRA


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow over the sigmas of the model's scheduler, shift included, as diffusers' script.

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
    frames = list(noisy.to(dtype).unsqueeze(2).unbind())
    captions = _captions({**conditioning, "prompt_embeds": conditioning["prompt_embeds"].to(dtype)})
    return -torch.stack(denoiser(frames, 1 - times, captions, return_dict=False)[0]).squeeze(2)


def _captions(conditioning: Conditioning) -> list[Tensor]:
    """Embeddings ``[L_i, D]`` of every caption."""
    captions = conditioning["prompt_embeds"]
    if len(captions) == 1:  # it has no padding
        return [captions[0]]
    lengths = conditioning["prompt_embeds_mask"].sum(1).tolist()  # waits for the GPU, as lists need numbers
    return [embeds[:length] for embeds, length in zip(captions, lengths, strict=True)]


def negative_prompt(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """``pos + g (pos - neg)``: any guidance above 0 needs one; "" unless another is given."""
    return (given or "") if guidance_scale > 0 else None


def call_arguments(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Prompt embeddings for the pipeline's call, which takes lists of them."""
    arguments = {"prompt_embeds": _captions(conditioning)}
    if negative is not None:
        arguments["negative_prompt_embeds"] = _captions(negative)
    return arguments
