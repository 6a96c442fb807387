"""Krea 2, Raw and Turbo: transformer over packed latents and the states of many layers of Qwen3-VL, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Krea2Pipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3VLTextConfig

from dreamlora.errors import UserError
from dreamlora.families import _chat, _flow, _packed, _parts, _qwen_vae
from dreamlora.families._qwen_prompt import AFTER, BEFORE, DROPPED, END
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

PIPELINES: tuple[str, ...] = ("Krea2Pipeline",)
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": _chat.QWEN_TOKENIZERS,
        "text_encoder": ("transformers.Qwen3VLModel", "transformers.Qwen3VLForConditionalGeneration"),
    },
    "vae": {"vae": _qwen_vae.CLASSES},
    "denoiser": {"transformer": ("diffusers.Krea2Transformer2DModel",)},
    "scheduler": {"scheduler": _parts.FLOW_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {"text_encoder_select_layers": None, "is_distilled": False, "patch_size": 2}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ()
EMBEDDING_KEYS: dict[str, str] = {}
# the authors' list, without the layers that see one vector of an image (time_embed.*, time_mod_proj) or give one number
# (text_fusion.projector): some ways to start a LoRA need more of either
LORA_LAYERS: tuple[str, ...] = (
    *("to_q", "to_k", "to_v", "to_out.0", "to_gate", "ff.up", "ff.down"),
    *("img_in", "txt_in.linear_1", "txt_in.linear_2", "final_layer.linear"),
)
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(
    ["to_q", "to_k", "to_v", "to_out.0", "to_gate"], ["ff.gate", "ff.up", "ff.down"]
)
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = 512
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {"prompt_embeds": 1, "prompt_embeds_mask": 1}
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "max_sequence_length", "negative_prompt")

TAPS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Layers whose states the transformer is given, unless the pipeline says others; 0 are the embeddings."""

latent_size = _qwen_vae.latent_size
shows_images = _parts.shows_none
encode_conditioning = _parts.nothing_shown
text_pictures = _parts.no_text_pictures
encode_images = _qwen_vae.encode_images
describe_views = _parts.nothing_of_views
call_options = _parts.guided


def load(source: ModelSource, role: Role, dtype: Any) -> Components:
    """One part of the pipeline on the CPU, frozen, in eval mode.

    Raises:
        UserError: the folder or hub repository is missing, incomplete or holds pickles; or its settings do not belong
            to its parts.
    """
    _check_settings(source)
    return loading.load_role(source, PARTS[role], dtype, OPTIONAL, SETTINGS)


def _check_settings(source: ModelSource) -> None:
    settings = loading.read_settings(source, SETTINGS)
    if settings["patch_size"] != 2:
        raise UserError(
            f"{source.path}: model_index.json says patch_size: {settings['patch_size']}, where 2 is expected"
        )
    taps = _taps(settings)
    wanted = loading.read_config(source, DENOISER).get("num_text_layers", len(TAPS))
    text = loading.read_config(source, "text_encoder").get("text_config")
    said = text.get("num_hidden_layers") if isinstance(text, dict) else None
    layers = said if isinstance(said, int) else Qwen3VLTextConfig().num_hidden_layers  # configs leave defaults out
    fits = all(isinstance(tap, int) and -layers - 1 <= tap <= layers for tap in taps)
    if len(taps) != wanted or not fits:
        raise UserError(
            f"{source.path}: model_index.json says text_encoder_select_layers: {list(taps)}, where {wanted} of the "
            f"{layers} layers of its text encoder are expected: they do not belong together; download or export the "
            "model again"
        )


def _taps(settings: Settings) -> tuple[int, ...]:
    return tuple(settings["text_encoder_select_layers"] or TAPS)


def resolution(source: ModelSource) -> int:
    """The pipeline's default side."""
    return 1024


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """The pipeline's own; Turbo's as its authors have them, without guidance (0 here, not 1)."""
    if distilled(source):
        return SampleDefaults(num_inference_steps=8, guidance_scale=0.0)
    return SampleDefaults(num_inference_steps=28, guidance_scale=4.5)


def distilled(source: ModelSource) -> str | None:
    """Turbo says so itself."""
    if not loading.read_settings(source, SETTINGS)["is_distilled"]:
        return None
    return (
        "Krea 2 Turbo was distilled to eight steps: train Krea 2 Raw (krea/Krea-2-Raw), whose LoRAs Turbo takes as "
        "well, or with --training_adapter ostris/krea2_turbo_training_adapter"
    )


def prompt_limit(tokenizer: Any, max_length: int | None) -> int:
    """Tokens that count of a prompt, with the template's after it.

    Raises:
        UserError: there would be none left for the prompt.
    """
    length = PROMPT_DEFAULT if max_length is None else max_length
    assert length is not None
    if length <= END:
        raise UserError(f"--max_sequence_length must be more than {END}, which the template has (got {length})")
    return length


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """How many tokens each prompt has, with the template's after it."""
    begun = tokenizer([BEFORE + prompt for prompt in prompts], verbose=False).input_ids
    return [len(ids) - DROPPED + END for ids in begun]


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, 34 + L]``, in the template; padded to the longest, at the end.

    The pipeline pads to its full length before the template's end, and gives both no position: to a causal model that
    is the same, and a short prompt takes a tenth of the time.

    Raises:
        UserError: see ``prompt_limit``.
    """
    tokenizer = text["tokenizer"]
    most = DROPPED + prompt_limit(tokenizer, max_length) - END
    begun = tokenizer([BEFORE + prompt for prompt in prompts], truncation=True, max_length=most).input_ids
    end = tokenizer(AFTER).input_ids
    ids = [torch.tensor([*row, *end]) for row in begun]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, layers, D]``, zero where a shorter prompt is padded, and ``prompt_embeds_mask``
    ``[B, L]``: of Krea2Pipeline.encode_prompt what its mask has.
    """
    if "prompt_embeds" in tokens:
        return {name: tokens[name] for name in LENGTH_AXES}
    states = torch.stack(_chat.layer_states(text["text_encoder"], tokens, _taps(text["settings"])), dim=2)
    embeds, mask = _chat.unpadded(states[:, DROPPED:], tokens["attention_mask"][:, DROPPED:])
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


encode_tokens = encode_frozen  # the text encoder never trains: the pipeline's files have no place for its LoRA


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow, its times shifted by the number of image tokens as in Raw's pipeline: a factor of 2.5 at
    1024 x 1024, as musubi-tuner advises; diffusers' script shifts nothing.

    Raises:
        UserError: options of diffusion models are given, or the scheduler's config has no usable shift.
    """
    return _flow.objective(scheduler, train, shift="scheduler")


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is not used (no guidance embedding).

    Raises:
        UserError: h or w is odd (the transformer sees patches of 2 x 2 latents).
    """
    dtype = _parts.dtype_of(denoiser)
    prompt = conditioning["prompt_embeds"].to(dtype)
    height, width = noisy.shape[2:]
    tokens = denoiser(
        hidden_states=_packed.pack(noisy.to(dtype)),
        encoder_hidden_states=prompt,
        timestep=times.to(dtype),
        position_ids=Krea2Pipeline.prepare_position_ids(prompt.shape[1], height // 2, width // 2, noisy.device),
        encoder_attention_mask=_chat.attended(conditioning["prompt_embeds_mask"]),
        return_dict=False,
    )[0]
    return _packed.unpack(tokens, (height, width))


def pipeline(components: Components) -> Krea2Pipeline:
    """A stock pipeline around these parts; parts not given are None."""
    parts = {name: components.get(name) for role in PARTS.values() for name in role}
    return Krea2Pipeline(**parts, **{name: components["settings"][name] for name in SETTINGS})


def negative_prompt(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """Guidance is on above 0: the call counts one less than others do."""
    return (given or "") if guidance_scale > 0 else None


def call_arguments(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Prompt embeddings for the pipeline's call, both of one length: it makes positions for the first alone."""
    arguments = _chat.with_negative(conditioning, negative)
    return {name: value.bool() if "mask" in name else value for name, value in arguments.items()}
