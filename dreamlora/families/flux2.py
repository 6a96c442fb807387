"""FLUX.2: [klein] (4B and 9B, base and distilled; Qwen3) and [dev] (Mistral 3, guidance embedding), rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_unshuffle

from dreamlora.errors import UserError
from dreamlora.families import _chat, _flow, _flux, _packed, _parts
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
from dreamlora.models import loading
from dreamlora.objectives import RectifiedFlow
from dreamlora.objectives.densities import LogitNormal

PIPELINES: tuple[str, ...] = ("Flux2KleinPipeline", "Flux2Pipeline")
REFUSED: dict[str, str] = {}
PARTS: dict[Role, dict[str, Classes]] = {
    "text": {
        "tokenizer": (
            *("transformers.Qwen2Tokenizer", "transformers.Qwen2TokenizerFast", "transformers.PixtralProcessor"),
            *("transformers.PreTrainedTokenizerFast", "transformers.TokenizersBackend"),
        ),
        "text_encoder": ("transformers.Qwen3ForCausalLM", "transformers.Mistral3ForConditionalGeneration"),
    },
    "vae": {"vae": ("diffusers.AutoencoderKLFlux2",)},
    "denoiser": {"transformer": ("diffusers.Flux2Transformer2DModel",)},
    "scheduler": {"scheduler": _parts.FLOW_SCHEDULERS},
}
OPTIONAL: frozenset[str] = frozenset()
SETTINGS: Settings = {"is_distilled": False}
DENOISER: str = "transformer"
SIDE_MULTIPLE: int = 16
TEXT_ENCODERS: tuple[str, ...] = ()
EMBEDDING_KEYS: dict[str, str] = {}
LORA_LAYERS: tuple[str, ...] = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.to_qkv_mlp_proj", "attn.to_out"),  # of the single blocks, whose to_out is no list
)
LORA_PRESETS: dict[str, tuple[str, ...]] = _parts.lora_presets(
    [*LORA_LAYERS, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"],
    ["ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"],
)
TEXT_LORA_LAYERS: tuple[str, ...] = ()
PROMPT_LENGTH: str = "max_sequence_length"
PROMPT_DEFAULT: int | None = 512
PROMPT_TOKENIZER: str = "tokenizer"
LENGTH_AXES: dict[str, int] = {}  # padding is attended, so it is a part of the model
OWN_OPTIONS: tuple[str, ...] = (
    *_flow.OWN_OPTIONS,
    *("guidance_scale", "negative_prompt", "max_sequence_length", "text_encoder_out_layers"),
)

FIRST_SHOWN = 10
"""Number of that image in the positions of its tokens."""
OUT_LAYERS = {"Flux2KleinPipeline": (9, 18, 27), "Flux2Pipeline": (10, 20, 30)}
"""The text encoder's layers whose states are joined to the embedding of a token."""

_MARK = "[INST]"
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}[SYSTEM_PROMPT]"
    + SYSTEM_MESSAGE
    + "[/SYSTEM_PROMPT]{% endif %}"
    "{% for message in messages %}{{ '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ '[/SYSTEM_PROMPT]' if message.role == 'system' else '[/INST]' }}{% endfor %}"
)
"""What Mistral Small 3's own template makes of turns of text; the system's message is FLUX.2's unless one is given."""

resolution = _flux.resolution
prompt_limit = _flux.prompt_limit
text_pictures = _parts.no_text_pictures
describe_views = _parts.nothing_of_views
call_arguments = _parts.with_negative
call_options = _parts.guided


def load(source: ModelSource, role: Role, dtype: Any) -> Components:
    """One part of the pipeline on the CPU, frozen, in eval mode; the layers that count are among the settings.

    Raises:
        UserError: the folder or hub repository is missing, incomplete or holds pickles; or the text encoder has not the
            layers that were asked for.
    """
    parts = loading.load_role(source, PARTS[role], dtype, OPTIONAL, SETTINGS)
    usual = OUT_LAYERS[parts["settings"]["_class_name"]]
    layers = source.text_layers or usual
    if role == "text":
        deepest = parts["text_encoder"].config.get_text_config().num_hidden_layers
        if len(layers) != len(usual) or max(layers) > deepest:
            raise UserError(
                f"--text_encoder_out_layers must be {len(usual)} layers from 0 to {deepest}, as this text encoder has "
                f"them (got {' '.join(map(str, layers))}); left out, they are {' '.join(map(str, usual))}"
            )
        parts["tokenizer"].chat_template = _template(parts["tokenizer"])
    return {**parts, "settings": {**parts["settings"], "text_encoder_out_layers": layers}}


def latent_size(source: ModelSource) -> LatentSize | None:
    """Of patches of 2 x 2 latents of the autoencoder."""
    channels = loading.read_config(source, "vae").get("latent_channels")
    return LatentSize(4 * channels, 2 * _parts.pixels_per_latent(source)) if isinstance(channels, int) else None


def sample_defaults(source: ModelSource) -> SampleDefaults:
    """The pipelines' own; the distilled [klein] was made for four steps without guidance."""
    if distilled(source):
        return SampleDefaults(num_inference_steps=4, guidance_scale=1.0)
    return SampleDefaults(num_inference_steps=50, guidance_scale=4.0)


def distilled(source: ModelSource) -> str | None:
    """As model_index.json says of a [klein]."""
    if not loading.read_settings(source, SETTINGS)["is_distilled"]:
        return None
    return (
        "this FLUX.2 [klein] was distilled to four steps: train its base model (FLUX.2-klein-base-4B or -9B) and use "
        "the LoRA on either"
    )


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """How many tokens each prompt has as a chat."""
    return [len(ids) for ids in _tokens(tokenizer, prompts, verbose=False).input_ids]


def tokenize(text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
    """``input_ids`` and ``attention_mask`` ``[B, L]`` of prompts as chats.

    Raises:
        UserError: see ``prompt_limit``.
    """
    tokenizer = text["tokenizer"]
    length = prompt_limit(tokenizer, max_length)
    batch = _tokens(tokenizer, prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def _tokens(tokenizer: Any, prompts: Sequence[str], **options: Any) -> Any:
    template = _template(tokenizer)
    if template is MISTRAL:
        prompts = [prompt.replace("[IMG]", "") for prompt in prompts]  # as the pipeline: it is the token of an image
    chats = _chat.as_chats(tokenizer, template, prompts, enable_thinking=False)
    return tokenizer(chats, add_special_tokens=False, **options)  # the template has written them


def _template(tokenizer: Any) -> str:
    """Mistral's or Qwen's, by the marks that the tokenizer knows."""
    known = tokenizer.convert_tokens_to_ids(_MARK)
    return _chat.QWEN if known in (None, tokenizer.unk_token_id) else MISTRAL


def encode_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """``prompt_embeds`` ``[B, L, 3 D]``: three layers' states joined, as the pipelines have them, padding too."""
    if "prompt_embeds" in tokens:
        return {"prompt_embeds": tokens["prompt_embeds"]}
    layers = text["settings"]["text_encoder_out_layers"]
    return {"prompt_embeds": torch.cat(_chat.layer_states(text["text_encoder"], tokens, layers), dim=-1)}


encode_tokens = encode_frozen  # the text encoder never trains: the pipelines' files have no place for its LoRA


def encode_images(vae: Components, pixels: Tensor) -> Latents:
    """Latents in patches ``[B, 4 C, h / 2, w / 2]`` by the statistics that the autoencoder's batch norm has of each
    channel; of the posterior's mode, as diffusers' script and the pipelines for reference images: nothing is drawn.
    """
    model = vae["vae"]
    modes = model.encode(pixels.to(device=model.device, dtype=model.dtype)).latent_dist.mode().float()
    mean, variance = (values.float().view(-1, 1, 1) for values in (model.bn.running_mean, model.bn.running_var))
    patches = (pixel_unshuffle(modes, 2) - mean) / torch.sqrt(variance + model.config.batch_norm_eps)
    return Latents(mean=patches, std=torch.zeros_like(patches))


def shows_images(source: ModelSource) -> bool:
    """All of FLUX.2 edit, and draw without an image just as well."""
    return True


def encode_conditioning(vae: Components, pixels: Tensor) -> Conditioning:
    """``conditioning_latents`` ``[B, 4 C, h / 2, w / 2]``, as of the images themselves."""
    return {_packed.SHOWN: encode_images(vae, pixels).mean}


def objective(scheduler: Any, train: Any) -> RectifiedFlow:
    """Rectified flow with times logit-normal and shifted by the number of tokens along the line of the scheduler's
    config, as musubi-tuner's ``flux2_shift``; diffusers' script draws them uniform and unshifted.

    Raises:
        UserError: see ``_flow.objective``.
    """
    return _flow.objective(scheduler, train, shift="scheduler", patch=1, density=LogitNormal(0.0, 1.0))


def predict(
    denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
) -> Tensor:
    """The velocity ``[B, C, h, w]`` at sigmas ``times``; ``guidance_scale`` is [dev]'s guidance embedding."""
    dtype = _parts.dtype_of(denoiser)
    tokens, ids = _placed(noisy.to(dtype), 0)
    if _packed.SHOWN in conditioning:
        before, places = _placed(conditioning[_packed.SHOWN].to(dtype), FIRST_SHOWN)
        tokens, ids = torch.cat([tokens, before], dim=1), torch.cat([ids, places])
    prompt = conditioning["prompt_embeds"].to(dtype)
    guided = _parts.bare(denoiser).config.guidance_embeds
    seen = denoiser(
        hidden_states=tokens,
        timestep=times.to(dtype),
        guidance=torch.full((len(noisy),), guidance_scale, device=noisy.device) if guided else None,
        encoder_hidden_states=prompt,
        txt_ids=pad(torch.arange(prompt.shape[1], device=noisy.device)[:, None], (3, 0)),
        img_ids=ids,
        return_dict=False,
    )[0]
    return seen[:, : noisy.shape[2] * noisy.shape[3]].transpose(1, 2).unflatten(2, noisy.shape[2:])


def _placed(latents: Tensor, image: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, h w, 4 C]`` of latents, and their positions ``[h w, 4]``: number of the image, row, column, 0."""
    rows, columns = latents.shape[2:]
    ids = _packed.image_ids(rows, columns, latents.device, torch.int64, image)
    return latents.flatten(2).transpose(1, 2), pad(ids, (0, 1))


def pipeline(components: Components) -> Any:
    """A stock pipeline of the class that the model names around these parts; parts not given are None."""
    parts = {name: components.get(name) for role in PARTS.values() for name in role}
    settings = components["settings"]
    if settings["_class_name"] == "Flux2Pipeline":
        return Flux2Pipeline(**parts)
    return Flux2KleinPipeline(**parts, is_distilled=settings["is_distilled"])


def negative_prompt(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """Only the base [klein] has classifier-free guidance."""
    settings = loading.read_settings(source, SETTINGS)
    if settings["_class_name"] == "Flux2Pipeline" or settings["is_distilled"]:
        return None
    return _parts.negative_above_one(source, guidance_scale, given)
