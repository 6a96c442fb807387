"""Z-Image and Z-Image-Turbo: transformer over captions of any length, Qwen3 as the text encoder, rectified flow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.families import _chat, _flow, _parts
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
from dreamlora.objectives import RectifiedFlow

PIPELINES: tuple[str, ...] = ("ZImagePipeline",)
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": ("transformers.Qwen2Tokenizer", "transformers.Qwen2TokenizerFast"),
        "text_encoder": ("transformers.Qwen3Model", "transformers.Qwen3ForCausalLM"),
    },
    "vae": {"vae": ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny")},
    "denoiser": {"transformer": ("diffusers.ZImageTransformer2DModel",)},
    "scheduler": {"scheduler": _parts.FLOW_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ()
LORA_LAYERS: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
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

latent_size = _parts.latent_size
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
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


def prompt_limit(tokenizer: Any, max_length: int | None) -> int:
    """Tokens that count of a prompt, the marks of the chat included.

    Raises:
        UserError: more than 512 tokens are asked for.
    """
    length = LONGEST_PROMPT if max_length is None else max_length
    if length > LONGEST_PROMPT:
        raise UserError(f"--max_sequence_length must be at most {LONGEST_PROMPT} (got {length})")
    return length


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


def encode_images(vae: Components, pixels: Tensor) -> Latents:
    """Moments of the latents of pixels ``[B, 3, H, W]`` in [-1, 1]."""
    return _parts.vae_latents(vae, pixels)


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
    height, width = noisy.shape[-2:]
    if height % 2 or width % 2:
        raise UserError(
            f"Z-Image needs images whose sides are multiples of 16 pixels (got latents of {height} x {width})"
        )
    dtype = _parts.dtype_of(denoiser)
    frames = list(noisy.to(dtype).unsqueeze(2).unbind())
    captions = _captions({**conditioning, "prompt_embeds": conditioning["prompt_embeds"].to(dtype)})
    return -torch.stack(denoiser(frames, 1 - times, captions, return_dict=False)[0]).squeeze(2)


def _captions(conditioning: Conditioning) -> list[Tensor]:
    """Embeddings ``[L_i, D]`` of every caption."""
    lengths = conditioning["prompt_embeds_mask"].sum(1).tolist()  # waits for the device, as lists need numbers
    return [embeds[:length] for embeds, length in zip(conditioning["prompt_embeds"], lengths, strict=True)]


def pipeline(components: Components) -> ZImagePipeline:
    """A stock pipeline around these parts; parts not given are None."""
    return ZImagePipeline(**{name: components.get(name) for role in PARTS.values() for name in role})


def negative_prompt(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """``pos + g (pos - neg)``: any guidance above 0 needs one; "" unless another is given."""
    return (given or "") if guidance_scale > 0 else None


def call_arguments(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Prompt embeddings for the pipeline's call, which takes lists of them."""
    arguments = {"prompt_embeds": _captions(conditioning)}
    if negative is not None:
        arguments["negative_prompt_embeds"] = _captions(negative)
    return arguments


def save_lora(folder: Path, denoiser: nn.Module, text: Mapping[str, nn.Module]) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` as ZImagePipeline.load_lora_weights reads it."""
    return _parts.save_lora(ZImagePipeline, folder, {DENOISER: denoiser})
