"""Sana 1.0 and 1.5: linear transformer over latents of a deep autoencoder, Gemma 2 as text encoder, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from dreamlora.families import _chat, _flow, _parts, _solvers
from dreamlora.interfaces import (
    Classes,
    Components,
    Conditioning,
    Latents,
    LatentSize,
    ModelSource,
    Role,
    SampleDefaults,
    Settings,
)
from dreamlora.models import configs, loading
from dreamlora.objectives import RectifiedFlow
from dreamlora.objectives.densities import LogitNormal

USUAL_PROMPT = 300
"""Tokens that SanaPipeline takes unless told otherwise."""
LONGEST_PROMPT = 4096
"""Of tokens: what Gemma 2 sees at once in every other layer."""
TIMES = 1000
"""What the pipeline calls σ = 1."""
LARGEST_SIDE = 1024
"""Of the latents that a transformer was made for: 16 to 128 in all known ones."""
INSTRUCTION = "\n".join(
    [
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    ]
)
"""What Sana was trained with before every caption (``complex_human_instruction`` of SanaPipeline's call)."""

PIPELINES: tuple[str, ...] = ("SanaPipeline",)
REFUSED: dict[str, str] = {
    "SanaSprintPipeline": "a Sana that was distilled to few steps, which training would undo: give Sana 1.0 or 1.5"
}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": _chat.GEMMA,
    "vae": {"vae": ("diffusers.AutoencoderDC",)},
    "denoiser": {"transformer": ("diffusers.SanaTransformer2DModel",)},
    "scheduler": {"scheduler": (*_solvers.FLOW_SOLVERS, *_parts.FLOW_SCHEDULERS)},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 32
TEXT_ENCODERS: tuple[str, ...] = ()
EMBEDDING_KEYS: dict[str, str] = {}
LORA_LAYERS: tuple[str, ...] = ("to_k", "to_q", "to_v")
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(
    [*LORA_LAYERS, "to_out.0"], ["ff.conv_inverted", "ff.conv_point"]
)
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = USUAL_PROMPT
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {"prompt_embeds": 1, "prompt_attention_mask": 1}
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "negative_prompt", "max_sequence_length")

load = _parts.loader(PARTS, OPTIONAL, SETTINGS)
pipeline = _parts.pipeline_of(SanaPipeline, PARTS)
distilled = _parts.never_distilled
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
# with the begin and the instruction's last token, which are all that is kept of it
prompt_limit = _parts.prompts_up_to(LONGEST_PROMPT, USUAL_PROMPT)
negative_prompt = _chat.marked_negative
describe_views = _parts.nothing_of_views


def _pixels_per_latent(source: ModelSource) -> int:
    levels = loading.read_sizes(source, "vae", "encoder_block_out_channels", configs.LARGEST_NUMBER)
    return int(2 ** (len(levels) - 1))


def resolution(source: ModelSource) -> int:
    """The side the transformer was made for, in pixels (512 to 4096): SanaPipeline itself always draws 1024 pixels
    unless told otherwise.
    """
    return loading.read_sizes(source, DENOISER, "sample_size", LARGEST_SIDE)[0] * _pixels_per_latent(source)


def latent_size(source: ModelSource) -> LatentSize | None:
    """Of the autoencoder: 32 channels, 32 pixels."""
    channels = loading.read_sizes(source, "vae", "latent_channels", configs.LARGEST_NUMBER)[0]
    return LatentSize(channels, _pixels_per_latent(source))


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """SanaPipeline's own."""
    return SampleDefaults(num_inference_steps=20, guidance_scale=4.5)


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """How many tokens each prompt has, as ``prompt_limit`` counts them."""
    dropped = _dropped(tokenizer)
    texts = [_text(prompt) for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    return [
        length - (0 if prompt.startswith(_chat.NEGATIVE) else dropped)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def _text(prompt: str) -> str:
    """What Gemma reads: lower case, as SanaPipeline has it."""
    wanted = prompt.removeprefix(_chat.NEGATIVE).lower().strip()
    return wanted if prompt.startswith(_chat.NEGATIVE) else INSTRUCTION + wanted


def _dropped(tokenizer: Any) -> int:
    """Tokens of the instruction that are not kept: all between the begin and the last one."""
    return len(tokenizer.encode(INSTRUCTION)) - 2


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]`` of the instruction and the prompt, and ``kept`` ``[B, L]``: True
    for what is left of them, at most ``max_length``.

    Raises:
        UserError: see ``prompt_limit``.
    """
    tokenizer, limit = text["tokenizer"], prompt_limit(text["tokenizer"], max_length)
    tokenizer.padding_side = "right"
    dropped = [0 if prompt.startswith(_chat.NEGATIVE) else _dropped(tokenizer) for prompt in prompts]
    tokens = _parts.token_ids(tokenizer, [_text(prompt) for prompt in prompts], limit + max(dropped))
    place, skipped = torch.arange(limit + max(dropped)), torch.tensor(dropped)[:, None]
    kept = (place == 0) | ((place > skipped) & (place < skipped + limit))
    return {**tokens, "kept": kept & (tokens["attention_mask"] == 1)}


def encode_tokens(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]``, the last hidden states of the begin, of the instruction's last token and of the
    prompt, and ``prompt_attention_mask`` ``[B, L]``, 0 for padding: as SanaPipeline.encode_prompt gives them, without
    the padding that all have.
    """
    if "prompt_embeds" in tokens:
        return tokens
    encoder = text["text_encoder"]
    ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    states = encoder(ids, attention_mask=mask).last_hidden_state
    embeds, kept = _chat.unpadded(states, tokens["kept"].to(mask.dtype))
    return {"prompt_embeds": embeds, "prompt_attention_mask": kept}


encode_frozen = encode_tokens  # Gemma 2 never trains


def encode_images(vae: Components, pixels: Tensor) -> Latents:
    """The latents of pixels ``[B, 3, H, W]`` in [-1, 1], without a posterior."""
    model = vae["vae"]
    latent = model.encode(pixels.to(device=model.device, dtype=model.dtype)).latent
    mean = latent.float() * model.config.scaling_factor
    return Latents(mean=mean, std=torch.zeros_like(mean))


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow with the scheduler's static shift (3) and logit-normal times, as its authors' configs have both.

    Raises:
        UserError: see ``_flow.objective``.
    """
    times = LogitNormal(0.0, 1.0)
    return _flow.objective(_solvers.as_flow(scheduler), train, shift="scheduler", patch=1, density=times)


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is not used (no guidance embedding)."""
    dtype = _parts.dtype_of(denoiser)
    velocity: Tensor = denoiser(
        noisy.to(dtype),
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        encoder_attention_mask=conditioning["prompt_attention_mask"],
        timestep=times * TIMES * _parts.bare(denoiser).config.timestep_scale,
        return_dict=False,
    )[0]
    return velocity[:, : noisy.shape[1]]  # some have a learned variance behind


def call_arguments(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Prompt embeddings for the pipeline's call, whose own negative prompt is "" unless told otherwise."""
    arguments = _chat.with_negative(conditioning, negative)
    return arguments if negative is None else {**arguments, "negative_prompt": None}


def call_options(guidance_scale: float) -> dict[str, Any]:
    """The size is not rounded to one of the pipeline's list."""
    return {"guidance_scale": guidance_scale, "use_resolution_binning": False}
