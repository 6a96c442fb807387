"""Stable Diffusion 3 and 3.5: transformer over latents, two CLIP text encoders and T5 (or none), rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

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
from dreamlora.objectives.densities import LogitNormal

USUAL_PROMPT = 256
"""T5 tokens that StableDiffusion3Pipeline takes unless told otherwise."""
LONGEST_PROMPT = 512
"""And at most."""
TIMES = 1000
"""What the transformer calls σ = 1."""
LARGEST_SIDE = 1024
"""Of the latents that a transformer was made for: 128 in all known ones."""
WIDEST = 2**16
"""Of prompt embeddings: 4096 in all known ones."""

PIPELINES: tuple[str, ...] = ("StableDiffusion3Pipeline",)
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        **dict.fromkeys(("tokenizer", "tokenizer_2"), _parts.CLIP_TOKENIZERS),
        "tokenizer_3": _parts.T5_TOKENIZERS,
        **dict.fromkeys(("text_encoder", "text_encoder_2"), ("transformers.CLIPTextModelWithProjection",)),
        "text_encoder_3": ("transformers.T5EncoderModel",),
    },
    "vae": {"vae": _parts.AUTOENCODERS},
    "denoiser": {"transformer": ("diffusers.SD3Transformer2DModel",)},
    "scheduler": {"scheduler": _parts.FLOW_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset({"tokenizer_3", "text_encoder_3"})
SETTINGS: Settings = {}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ("text_encoder", "text_encoder_2")
EMBEDDING_KEYS: dict[str, str] = {}
LORA_LAYERS: tuple[str, ...] = (
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "add_k_proj",
    "add_q_proj",
    "add_v_proj",
    "to_add_out",
)
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(
    LORA_LAYERS, ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
)
"""All attention: also the second one (``attn2``) that the first blocks of 3.5 medium have."""
TEXT_LORA_LAYERS: tuple[str, ...] = _parts.CLIP_LORA_LAYERS
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = USUAL_PROMPT
PROMPT_TOKENIZER: str = "tokenizer_3"
LENGTH_AXES: dict[str, int] = {}  # padding is attended, so it is a part of the model
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "negative_prompt", "max_sequence_length")

pipeline = _parts.pipeline_of(StableDiffusion3Pipeline, PARTS)
latent_size = _parts.latent_size
encode_images = _parts.vae_latents
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
count_tokens = _parts.count_tokens
describe_views = _parts.nothing_of_views
negative_prompt = _parts.negative_above_one
call_arguments = _parts.with_negative
call_options = _parts.guided


def load(source: ModelSource, role: Role, dtype: Any) -> Components:
    """One part of the pipeline on the CPU, frozen, in eval mode; the "settings" have the width of prompt embeddings
    besides.

    Raises:
        UserError: the folder or hub repository is missing, incomplete or holds pickles.
    """
    parts = loading.load_role(source, PARTS[role], dtype, OPTIONAL, SETTINGS)
    width = loading.read_sizes(source, DENOISER, "joint_attention_dim", WIDEST)[0]
    return {**parts, "settings": {**parts["settings"], "joint_attention_dim": width}}


_t5_limit = _parts.prompts_up_to(LONGEST_PROMPT, USUAL_PROMPT)


def resolution(source: ModelSource) -> int:
    """The side the transformer was made for, in pixels (1024 for 3 and 3.5)."""
    return loading.read_sizes(source, DENOISER, "sample_size", LARGEST_SIDE)[0] * _parts.pixels_per_latent(source)


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """StableDiffusion3Pipeline's own for 3; for 3.5, whose attention is normed, the guidance of its cards; four steps
    without guidance for turbo.
    """
    if distilled(source):
        return SampleDefaults(num_inference_steps=4, guidance_scale=0.0)
    normed = loading.read_config(source, DENOISER).get("qk_norm") is not None
    return SampleDefaults(num_inference_steps=28, guidance_scale=4.5 if normed else 7.0)


def distilled(source: ModelSource) -> str | None:
    """3.5 large turbo has nothing but its name that tells it from 3.5 large."""
    if "turbo" not in source.path.rstrip("/").rpartition("/")[2].lower():
        return None
    return "Stable Diffusion 3.5 large turbo was distilled to four steps: train Stable Diffusion 3.5 large instead"


def prompt_limit(tokenizer: Any, max_length: int | None) -> int:
    """Tokens that count of a prompt: T5's, its end included; without T5 those that CLIP reads.

    Raises:
        UserError: more than 512 tokens are asked for.
    """
    length = _t5_limit(tokenizer, max_length)
    return int(tokenizer.model_max_length) if isinstance(tokenizer, CLIPTokenizer) else length


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, 77]`` for CLIP, the same of the second tokenizer with "_2" behind, and
    ``input_ids_3`` ``[B, L]`` for T5 (zeros without); ``max_length`` is T5's. CLIP reads the beginning of a prompt.

    Raises:
        UserError: see ``prompt_limit``.
    """
    length, clip_length = _t5_limit(text["tokenizer_3"], max_length), text["tokenizer"].model_max_length
    first, second = (_parts.token_ids(text[name], prompts, clip_length) for name in ("tokenizer", "tokenizer_2"))
    if text["tokenizer_3"] is None:
        t5 = torch.zeros(len(prompts), length, dtype=torch.int64)
    else:
        t5 = _parts.token_ids(text["tokenizer_3"], prompts, length)["input_ids"]
    return {**first, **{f"{name}_2": ids for name, ids in second.items()}, "input_ids_3": t5}


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``t5_embeds`` ``[B, L, D]`` in place of ``input_ids_3``: zeros without T5, as StableDiffusion3Pipeline has it."""
    rest = {name: ids for name, ids in tokens.items() if name != "input_ids_3"}
    t5, ids = text["text_encoder_3"], tokens["input_ids_3"]
    if t5 is None:
        clip = _parts.bare(text["text_encoder"])
        embeds = torch.zeros(*ids.shape, text["settings"]["joint_attention_dim"], device=clip.device, dtype=clip.dtype)
    else:
        embeds = t5(ids.to(_parts.bare(t5).device))[0]
    return {**rest, "t5_embeds": embeds}


def encode_tokens(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, 77 + L, D]``: the last hidden states but one of both CLIP side by side, zeros beside
    them up to T5's width, and T5's behind; ``pooled_prompt_embeds`` ``[B, P1 + P2]``, as
    StableDiffusion3Pipeline.encode_prompt gives them.
    """
    if "t5_embeds" not in tokens:
        tokens = encode_frozen(text, tokens)
    second = {name.removesuffix("_2"): ids for name, ids in tokens.items() if name.endswith("_2")}
    states, pooled = _parts.clip_states(text["text_encoder"], text["tokenizer"], tokens, layer=-2)
    states_2, pooled_2 = _parts.clip_states(text["text_encoder_2"], text["tokenizer_2"], second, layer=-2)
    assert pooled is not None and pooled_2 is not None  # this class has a projection
    t5, clip = tokens["t5_embeds"].to(states.device), torch.cat([states, states_2], dim=-1)
    clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return {
        "prompt_embeds": torch.cat([clip, t5], dim=1),
        "pooled_prompt_embeds": torch.cat([pooled, pooled_2], dim=-1),
    }


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow with the scheduler's static shift (3) and logit-normal times (arXiv 2403.03206, section 5.3); the
    loss is of the velocity, where diffusers' script has that of the image (``--precondition_outputs``).

    Raises:
        UserError: see ``_flow.objective``.
    """
    return _flow.objective(scheduler, train, shift="scheduler", density=LogitNormal(0.0, 1.0))


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is not used (no guidance embedding).

    Raises:
        UserError: h or w is more than the transformer has positions for.
    """
    config = _parts.bare(denoiser).config
    most = config.pos_embed_max_size * config.patch_size
    if max(noisy.shape[-2:]) > most:
        raise UserError(
            f"this Stable Diffusion 3 has positions for images of at most {most} x {most} latents (got "
            f"{noisy.shape[-2]} x {noisy.shape[-1]}): give a smaller --resolution, or leave --buckets out"
        )
    dtype = _parts.dtype_of(denoiser)
    velocity: Tensor = denoiser(
        hidden_states=noisy.to(dtype),
        timestep=times * TIMES,
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
        return_dict=False,
    )[0]
    return velocity
