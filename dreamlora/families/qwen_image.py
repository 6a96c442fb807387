"""Qwen-Image (2512 too), Edit, Edit-Plus (2509, 2511): transformer of two streams over packed latents, Qwen2.5-VL as
text encoder, rectified flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import QwenImagePipeline
from PIL.Image import Image
from torch import Tensor, nn

from dreamlora.families import _chat, _flow, _packed, _parts, _qwen_edit, _qwen_vae
from dreamlora.families._qwen_prompt import AFTER, BEFORE, DROPPED
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

PIPELINES: tuple[str, ...] = ("QwenImagePipeline", *_qwen_edit.PIPELINES)
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": _chat.QWEN_TOKENIZERS,
        "text_encoder": ("transformers.Qwen2_5_VLForConditionalGeneration",),
    },
    "vae": {"vae": _qwen_vae.CLASSES},
    "denoiser": {"transformer": ("diffusers.QwenImageTransformer2DModel",)},
    "scheduler": {"scheduler": _parts.FLOW_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ()
EMBEDDING_KEYS: dict[str, str] = {}
# both streams, as the trainers of this model have it; diffusers' script adapts the attention of the image's alone
LORA_LAYERS: tuple[str, ...] = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(LORA_LAYERS[:8], LORA_LAYERS[8:])
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = 512
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {"prompt_embeds": 1, "prompt_embeds_mask": 1}
OWN_OPTIONS: tuple[str, ...] = (*_flow.OWN_OPTIONS, "max_sequence_length", "negative_prompt")

LONGEST_PROMPT = 1024
"""Tokens that the pipeline takes at most, without those before the prompt but with the template's after it."""

latent_size = _qwen_vae.latent_size
distilled = _parts.never_distilled
encode_images = _qwen_vae.encode_images
prompt_limit = _parts.prompts_up_to(LONGEST_PROMPT, 512)
describe_views = _parts.nothing_of_views
call_arguments = _parts.with_negative


def load(source: ModelSource, role: Role, dtype: Any) -> Components:
    """One part of the pipeline on the CPU, frozen, in eval mode; with the text encoder of a pipeline that edits its
    "processor".

    Raises:
        UserError: the folder or hub repository is missing, incomplete or holds pickles.
    """
    parts = loading.load_role(source, PARTS[role], dtype, OPTIONAL, SETTINGS)
    if role == "text" and _edits(parts):
        parts["processor"] = _qwen_edit.load_processor(source, parts)
    return parts


def _edits(parts: Components) -> bool:
    return parts["settings"]["_class_name"] in _qwen_edit.PIPELINES


def resolution(source: ModelSource) -> int:
    """The pipeline's default side: 128 latents, 1024 pixels."""
    return 128 * _qwen_vae.pixels_per_latent(source)


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """The pipeline's steps and guidance, which it heeds only with a negative prompt: a blank is the model card's."""
    return SampleDefaults(num_inference_steps=50, guidance_scale=4.0, negative_prompt=" ")


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """How many tokens each prompt has, with the template's after it."""
    return [len(ids) - DROPPED for ids in tokenizer(_templated(prompts), verbose=False).input_ids]


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, T + L]``, in the template; padded to the longest, at the end. T are
    the template's before the prompt: 34, or with a picture, for which one token stands, 67 or more.

    Raises:
        UserError: see ``prompt_limit``.
    """
    tokenizer = text["tokenizer"]
    before = _qwen_edit.BEFORE.get(text["settings"]["_class_name"], BEFORE)
    batch = tokenizer(
        _templated(prompts, before),
        padding=True,
        padding_side="right",
        max_length=len(tokenizer(before).input_ids) + prompt_limit(tokenizer, max_length),
        truncation=True,
        return_tensors="pt",
    )
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def _templated(prompts: Sequence[str], before: str = BEFORE) -> list[str]:
    return [before + prompt + AFTER for prompt in prompts]


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, D]``, the last hidden states after their norm, zero where a shorter prompt is padded,
    and ``prompt_embeds_mask`` ``[B, L]``, as QwenImagePipeline.encode_prompt gives them.
    """
    if "prompt_embeds" in tokens:
        return {name: tokens[name] for name in LENGTH_AXES}
    dropped = DROPPED
    if _edits(text):
        dropped, tokens = _qwen_edit.DROPPED, _qwen_edit.with_patches(text, tokens)
    [states] = _chat.layer_states(text["text_encoder"], tokens, [-1])
    embeds, mask = _chat.unpadded(states[:, dropped:], tokens["attention_mask"][:, dropped:])
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


encode_tokens = encode_frozen  # the text encoder never trains: the pipeline's files have no place for its LoRA


def shows_images(source: ModelSource) -> bool:
    """Those named Edit do, and nothing else."""
    return loading.read_settings(source, SETTINGS)["_class_name"] in _qwen_edit.PIPELINES


def text_pictures(source: ModelSource) -> Callable[[Image], Tensor] | None:
    """Edit's text encoder sees the image as the autoencoder does, Plus' a smaller one."""
    kind = loading.read_settings(source, SETTINGS)["_class_name"]
    return partial(_qwen_edit.picture, kind) if kind in _qwen_edit.PIPELINES else None


def encode_conditioning(vae: Components, pixels: Tensor) -> Conditioning:
    """``conditioning_latents`` ``[B, C, h, w]`` of the posterior's mode, in the area that the pipelines resize to."""
    return {_packed.SHOWN: _qwen_vae.encode_images(vae, _qwen_edit.prepared(pixels)).mean}


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow, its times shifted by the number of image tokens as in the pipeline: a factor of 2 at 1024 x 1024,
    much as musubi-tuner advises (2.2); diffusers' script shifts nothing.

    Raises:
        UserError: options of diffusion models are given, or the scheduler's config has no usable shift.
    """
    return _flow.objective(scheduler, train, shift="scheduler")


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is not used (no guidance embedding).

    Raises:
        UserError: see ``velocity``.
    """
    shown = [conditioning[_packed.SHOWN]] if _packed.SHOWN in conditioning else []
    return velocity(denoiser, [noisy, *shown], times, conditioning)


def velocity(denoiser: nn.Module, images: Sequence[Tensor], times: Tensor, conditioning: Conditioning) -> Tensor:
    """The velocity of the first image.

    Args:
        denoiser: a QwenImageTransformer2DModel.
        images: latents ``[B, C, h, w]``: noisy ones, then any that are shown to the model, of sizes of their own.
        times: sigmas ``[B]``.
        conditioning: of ``encode_tokens``.

    Raises:
        UserError: h or w is odd (the transformer sees patches of 2 x 2 latents).
    """
    dtype = _parts.dtype_of(denoiser)
    shapes = [(1, latents.shape[2] // 2, latents.shape[3] // 2) for latents in images]
    tokens = denoiser(
        hidden_states=torch.cat([_packed.pack(latents.to(dtype)) for latents in images], dim=1),
        timestep=times.to(dtype),
        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
        encoder_hidden_states_mask=_chat.attended(conditioning["prompt_embeds_mask"]),
        img_shapes=[shapes] * len(times),
        return_dict=False,
    )[0]
    height, width = images[0].shape[2:]
    return _packed.unpack(tokens[:, : height * width // 4], (height, width))


def pipeline(components: Components) -> Any:
    """A stock pipeline of the class that the model names around these parts; parts not given are None."""
    parts = {name: components.get(name) for role in PARTS.values() for name in role}
    if _edits(components):
        pipeline_class = _qwen_edit.PIPELINES[components["settings"]["_class_name"]]
        return pipeline_class(**parts, processor=components.get("processor"))
    return QwenImagePipeline(**parts)


def negative_prompt(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """The pipeline guides only where there is a negative prompt (see ``sample_defaults``)."""
    return given if guidance_scale > 1 else None


def call_options(guidance_scale: float) -> dict[str, Any]:
    """Guidance by its name in the call, where ``guidance_scale`` is another thing."""
    return {"true_cfg_scale": guidance_scale}
