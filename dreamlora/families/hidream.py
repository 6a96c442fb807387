"""HiDream-I1: mixture-of-experts transformer over latents, two CLIP, T5 and Llama text encoders, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import HiDreamImagePipeline
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.families import _flow, _parts, _solvers
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

USUAL_PROMPT = 128
"""Tokens that HiDreamImagePipeline takes unless told otherwise."""
LONGEST_PROMPT = 512
"""Of tokens: as many as T5 was trained with."""
LONGEST_CLIP = 218
"""Tokens that the pipeline gives CLIP at most."""
TIMES = 1000
"""What the transformer calls σ = 1."""
LATENT_SIDE = 128
"""Of the images that the pipeline draws."""
DISTILLED_SCHEDULER = "FlowMatchLCMScheduler"
"""Of Dev (28 steps) and Fast (16 steps); nothing else tells them from Full."""

PIPELINES: tuple[str, ...] = ("HiDreamImagePipeline",)
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        **dict.fromkeys(("tokenizer", "tokenizer_2"), _parts.CLIP_TOKENIZERS),
        "tokenizer_3": _parts.T5_TOKENIZERS,
        "tokenizer_4": ("transformers.PreTrainedTokenizerFast", "transformers.TokenizersBackend"),
        **dict.fromkeys(("text_encoder", "text_encoder_2"), ("transformers.CLIPTextModelWithProjection",)),
        "text_encoder_3": ("transformers.T5EncoderModel",),
        "text_encoder_4": ("transformers.LlamaForCausalLM",),
    },
    "vae": {"vae": _parts.AUTOENCODERS},
    "denoiser": {"transformer": ("diffusers.HiDreamImageTransformer2DModel",)},
    "scheduler": {"scheduler": (*_solvers.FLOW_SOLVERS, *_parts.FLOW_SCHEDULERS)},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ()
EMBEDDING_KEYS: dict[str, str] = {}
LORA_LAYERS: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out")
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(
    [*LORA_LAYERS, "to_k_t", "to_q_t", "to_v_t", "to_out_t"], ["w1", "w2", "w3"]
)
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = USUAL_PROMPT
PROMPT_TOKENIZER: str = "tokenizer_4"
LENGTH_AXES: dict[str, int] = {}  # padding is attended, so it is a part of the model
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "negative_prompt", "max_sequence_length")

load = _parts.loader(PARTS, OPTIONAL, SETTINGS)
pipeline = _parts.pipeline_of(HiDreamImagePipeline, PARTS)
latent_size = _parts.latent_size
encode_images = _parts.vae_latents
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
prompt_limit = _parts.prompts_up_to(LONGEST_PROMPT, USUAL_PROMPT)  # of Llama, its begin included
count_tokens = _parts.count_tokens
describe_views = _parts.nothing_of_views
negative_prompt = _parts.negative_above_one
call_options = _parts.guided


def resolution(source: ModelSource) -> int:
    """HiDreamImagePipeline's default side: 1024 pixels. Whatever size it is asked for, it scales to that area."""
    return LATENT_SIDE * _parts.pixels_per_latent(source)


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """HiDreamImagePipeline's own; Dev's and Fast's, which their schedulers' shifts tell apart, without guidance."""
    if distilled(source):
        dev = loading.read_config(source, "scheduler").get("shift") == 6
        return SampleDefaults(num_inference_steps=28 if dev else 16, guidance_scale=0.0)
    return SampleDefaults(num_inference_steps=50, guidance_scale=5.0)


def distilled(source: ModelSource) -> str | None:
    """Dev and Fast."""
    if loading.read_model_index(source).get("scheduler") != ["diffusers", DISTILLED_SCHEDULER]:
        return None
    return "HiDream-I1-Dev and -Fast were distilled to few steps: train HiDream-I1-Full instead"


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]`` of each tokenizer, with "_2", "_3", "_4" behind for all but the
    first.

    Raises:
        UserError: see ``prompt_limit``.
    """
    length = prompt_limit(text["tokenizer_4"], max_length)
    text["tokenizer_4"].pad_token = text["tokenizer_4"].eos_token  # as HiDreamImagePipeline has it
    tokens: Conditioning = {}
    for end, most in (("", LONGEST_CLIP), ("_2", LONGEST_CLIP), ("_3", None), ("_4", None)):
        tokenizer = text[f"tokenizer{end}"]
        ids = _parts.token_ids(tokenizer, prompts, min(length, most or tokenizer.model_max_length))
        tokens |= {f"{name}{end}": value for name, value in ids.items()}
    return tokens


def encode_tokens(text: Components, tokens: Conditioning) -> Conditioning:
    """As HiDreamImagePipeline.encode_prompt gives them, but batch first: ``prompt_embeds_t5`` ``[B, L, D]``,
    ``prompt_embeds_llama3`` ``[B, layers, L, D]``, the states after every layer of Llama, and ``pooled_prompt_embeds``
    ``[B, P1 + P2]`` of both CLIP.
    """
    if "pooled_prompt_embeds" in tokens:
        return tokens

    def encoded(end: str, **options: Any) -> Any:
        encoder = text[f"text_encoder{end}"]
        return encoder(tokens[f"input_ids{end}"].to(encoder.device), **options)

    masks = {end: tokens[f"attention_mask{end}"].to(text[f"text_encoder{end}"].device) for end in ("_3", "_4")}
    llama = encoded("_4", attention_mask=masks["_4"], output_hidden_states=True, use_cache=False)
    return {
        "prompt_embeds_t5": encoded("_3", attention_mask=masks["_3"]).last_hidden_state,
        "prompt_embeds_llama3": torch.stack(llama.hidden_states[1:], dim=1),
        "pooled_prompt_embeds": torch.cat([encoded(end).text_embeds for end in ("", "_2")], dim=-1),
    }


encode_frozen = encode_tokens  # none of the encoders trains: the stock pipeline would not load a LoRA of theirs


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow with the scheduler's static shift (3 for Full).

    Raises:
        UserError: see ``_flow.objective``.
    """
    return _flow.objective(_solvers.as_flow(scheduler), train, shift="scheduler")


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is not used (no guidance embedding).

    In training the experts pass gradients on. diffusers' script has the transformer act as in inference
    (``force_inference_output``), where they do not.

    Raises:
        UserError: the images are not square and have more tokens than the transformer keeps for such.
    """
    dtype, model = _parts.dtype_of(denoiser), _parts.bare(denoiser)
    height, width = noisy.shape[2:]
    side = model.config.patch_size
    tokens = (height // side) * (width // side)
    if height != width and tokens > model.max_seq:
        raise UserError(
            f"HiDream takes images that are not square only up to {model.max_seq} patches of {side} x {side} latents "
            f"(got latents of {height} x {width}, which are {tokens}): give a smaller --resolution, or square images"
        )
    output = denoiser(
        hidden_states=noisy.to(dtype),
        timesteps=times * TIMES,
        encoder_hidden_states_t5=conditioning["prompt_embeds_t5"].to(dtype),
        encoder_hidden_states_llama3=conditioning["prompt_embeds_llama3"].to(dtype).transpose(0, 1),
        pooled_embeds=conditioning["pooled_prompt_embeds"].to(dtype),
        return_dict=False,
    )[0]
    packed = model.training and not model.config.force_inference_output
    return -(_unpacked(output, height, width, side) if packed else output)


def _unpacked(patches: Tensor, height: int, width: int, side: int) -> Tensor:
    """``[B, C, tokens, side²]``, which the transformer gives in training, as ``[B, C, h, w]``; tokens beyond those of
    the image are padding.
    """
    rows, columns = height // side, width // side
    grid = patches[:, :, : rows * columns].unflatten(3, (side, side)).unflatten(2, (rows, columns))
    return grid.transpose(3, 4).reshape(*patches.shape[:2], height, width)


def call_arguments(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Prompt embeddings for the pipeline's call, which wants the layers of Llama first."""
    arguments = _parts.with_negative(conditioning, negative)
    return {name: value.transpose(0, 1) if "llama3" in name else value for name, value in arguments.items()}
