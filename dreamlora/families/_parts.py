"""What several families share: token ids, latents' moments, bare modules.

The functions under "What most families have in common" fulfil members of the contract and are taken over by assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.interfaces import (
    Classes,
    Components,
    Conditioning,
    Latents,
    LatentSize,
    ModelSource,
    Role,
    Settings,
    View,
)
from dreamlora.lora.pairs import bare
from dreamlora.models import configs, loading
from dreamlora.models.new_tokens import with_all_vectors

FLOW_SCHEDULERS: Classes = (
    "diffusers.FlowMatchEulerDiscreteScheduler",
    "diffusers.FlowMatchHeunDiscreteScheduler",
    "diffusers.FlowMatchLCMScheduler",
)

CLIP_TOKENIZERS: Classes = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")
T5_TOKENIZERS: Classes = ("transformers.T5TokenizerFast", "transformers.T5Tokenizer")
AUTOENCODERS: Classes = ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny")


def lora_presets(attention: Sequence[str], between: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """See ``Family.LORA_PRESETS``."""
    return {"attn": tuple(attention), "attn-mlp": (*attention, *between)}


CLIP_LORA_LAYERS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")

MARKS = 2
"""Begin and end of a text."""


def dtype_of(module: nn.Module) -> torch.dtype:
    """Precision of the model's own weights, by its first parameter (a LoRA layer's base comes before its factors).

    diffusers' ``dtype`` looks at every layer for hooks, which takes 2 % of a small model's step.
    """
    return next(parameter.dtype for parameter in bare(module).parameters() if parameter.is_floating_point())


def token_ids(tokenizer: Any, prompts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, max_length]``, padded or cut (``models.prompts`` tells of that)."""
    prompts = with_all_vectors(tokenizer, prompts)
    batch = tokenizer(prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def clip_limit(tokenizer: Any, max_length: int | None) -> int:
    """Tokens of a prompt that CLIP is given, begin and end included: the encoder's own 77, fewer, or whole chunks more.

    Raises:
        UserError: more are asked for, and not the 75 of a chunk, twice or three times these, ..., and begin and end.
    """
    longest: int = tokenizer.model_max_length
    limit = max_length or longest
    chunk = longest - MARKS
    if limit > longest and (limit - MARKS) % chunk:
        raise UserError(
            f"the text encoder reads prompts of at most {longest} tokens, begin and end included (got {limit}), and "
            f"longer ones in chunks of {chunk}: leave --tokenizer_max_length out and give --max_token_length "
            f"{2 * chunk} or {3 * chunk}"
        )
    return limit


def clip_states(
    encoder: Any, tokenizer: Any, tokens: Mapping[str, Tensor], layer: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Hidden states ``[B, L, D]`` of ``input_ids`` and ``attention_mask`` ``[B, L]``, and the pooled ones ``[B, P]`` of
    an encoder with a projection (else None).

    More tokens than the encoder has positions are encoded in chunks, each between a begin and an end of its own. What
    is kept is what kohya's sd-scripts keep (``--max_token_length``): the first begin, all tokens, the last end; and
    what the first chunk is pooled to.

    Args:
        encoder: a CLIPTextModel, with or without projection.
        tokenizer: its own.
        tokens: of ``token_ids``.
        layer: of ``hidden_states``; None: the last one, after its norm.
    """
    config, device = bare(encoder).config, bare(encoder).device
    ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    batch, chunk = len(ids), config.max_position_embeddings - MARKS
    whole = ids.shape[1] <= config.max_position_embeddings
    if not whole:
        ids, mask = _in_chunks(ids, mask, chunk, tokenizer)
    heeded = mask if getattr(config, "use_attention_mask", False) else None
    output = encoder(ids, attention_mask=heeded, output_hidden_states=layer is not None)
    states: Tensor = output.last_hidden_state if layer is None else output.hidden_states[layer]
    pooled: Tensor | None = getattr(output, "text_embeds", None)
    if whole:
        return states, pooled
    states = states.unflatten(0, (batch, -1))
    kept = torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
    return kept, None if pooled is None else pooled.unflatten(0, (batch, -1))[:, 0]


def _in_chunks(ids: Tensor, mask: Tensor, chunk: int, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Begin, tokens, end ``[B, n * chunk + 2]`` as ``[B * n, chunk + 2]``, and the mask so.

    Where padding is another token than the end, a text has one end, in the chunk where it ends, before its padding; a
    chunk that it fills, or does not reach, has one all the same: CLIP has seen no text without.
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    body, seen = (tensor[:, 1:-1].reshape(-1, chunk) for tensor in (ids, mask))
    n = len(body) // len(ids)
    last = body[:, -1:]
    ends = torch.where((last == pad) | (last == end), pad, end)
    body = torch.cat([torch.where(body[:, :1] == pad, end, body[:, :1]), body[:, 1:]], dim=1)
    begins = ids[:, :1].repeat_interleave(n, dim=0)
    return torch.cat([begins, body, ends], dim=1), torch.cat([torch.ones_like(begins), seen, seen[:, -1:]], dim=1)


def pixels_per_latent(source: ModelSource) -> int:
    """Pixels along a side that one latent stands for: each level of the autoencoder but the last halves the sides."""
    blocks = _BLOCKS.get(loading.read_config(source, "vae").get("_class_name", ""), "block_out_channels")
    return int(2 ** (len(loading.read_sizes(source, "vae", blocks, configs.LARGEST_NUMBER)) - 1))


_BLOCKS = {"AutoencoderTiny": "encoder_block_out_channels", "AsymmetricAutoencoderKL": "down_block_out_channels"}
"""Where an autoencoder names its levels otherwise than AutoencoderKL does."""


# What most families have in common


def loader(
    parts: Mapping[Role, Mapping[str, Classes]], optional: frozenset[str], settings: Settings
) -> Callable[[ModelSource, Role, Any], Components]:
    """``Family.load`` of a family with these parts and settings."""

    def load(source: ModelSource, role: Role, dtype: Any) -> Components:
        """See ``Family.load``."""
        return loading.load_role(source, parts[role], dtype, optional, settings)

    return load


def pipeline_of(
    pipeline_class: Any, parts: Mapping[Role, Mapping[str, Classes]], **options: Any
) -> Callable[[Components], Any]:
    """``Family.pipeline`` of a family with one stock pipeline, which takes these parts and no settings."""

    def pipeline(components: Components) -> Any:
        """See ``Family.pipeline``."""
        return pipeline_class(**{name: components.get(name) for role in parts.values() for name in role}, **options)

    return pipeline


def prompts_up_to(longest: int, usual: int | None = None) -> Callable[[Any, int | None], int]:
    """``Family.prompt_limit`` of a family whose prompts have ``usual`` tokens (else ``longest``) unless told otherwise,
    and at most ``longest``.
    """

    def prompt_limit(tokenizer: Any, max_length: int | None) -> int:
        """See ``Family.prompt_limit``.

        Raises:
            UserError: more tokens are asked for than the model takes.
        """
        length = (usual or longest) if max_length is None else max_length
        if length > longest:
            raise UserError(f"--max_sequence_length must be at most {longest} (got {length})")
        return length

    return prompt_limit


def latent_size(source: ModelSource) -> LatentSize | None:
    """See ``Family.latent_size``; for autoencoders of diffusers whose config has its levels."""
    settings = loading.read_config(source, "vae")
    channels = settings.get("latent_channels")
    known = settings.get("_class_name") in ("AutoencoderKL", "AutoencoderTiny")
    return LatentSize(channels, pixels_per_latent(source)) if known and isinstance(channels, int) else None


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """See ``Family.count_tokens``: with the tokenizer's own begin and end."""
    return [len(ids) for ids in tokenizer(with_all_vectors(tokenizer, prompts), verbose=False).input_ids]


def none_frozen(text: Components, tokens: Conditioning) -> Conditioning:
    """See ``Family.encode_frozen``: for families all of whose encoders can be trained, or none."""
    return tokens


def shows_none(source: ModelSource) -> bool:
    """See ``Family.shows_images``: for models that do not edit."""
    return False


def nothing_shown(vae: Components, pixels: Tensor) -> Conditioning:
    """See ``Family.encode_conditioning``: for models that do not edit."""
    return {}


def no_text_pictures(source: ModelSource) -> None:
    """See ``Family.text_pictures``: for models whose text encoders see prompts alone."""


def nothing_of_views(views: Sequence[View]) -> Conditioning:
    """See ``Family.describe_views``."""
    return {}


def never_distilled(source: ModelSource) -> str | None:
    """See ``Family.distilled``."""
    return None


def guided(guidance_scale: float) -> dict[str, Any]:
    """See ``Family.call_options``: for pipelines that call it so."""
    return {"guidance_scale": guidance_scale}


def negative_above_one(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """See ``Family.negative_prompt``: for classifier-free guidance that is off at 1; "" unless another is given."""
    return (given or "") if guidance_scale > 1 else None


def never_negative(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """See ``Family.negative_prompt``: for models that have guidance as an input."""
    return None


def with_negative(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """See ``Family.call_arguments``: for pipelines whose arguments have the names of the conditioning."""
    return {**conditioning, **{f"negative_{name}": value for name, value in (negative or {}).items()}}


def vae_latents(vae: Components, pixels: Tensor) -> Latents:
    """See ``Family.encode_images``: moments of the posterior of ``(z - shift_factor) * scaling_factor``, the factors
    being the autoencoder's.
    """
    model = vae["vae"]
    encoded = model.encode(pixels.to(device=model.device, dtype=model.dtype))
    scale, shift = model.config.scaling_factor, getattr(model.config, "shift_factor", None) or 0.0
    if not hasattr(encoded, "latent_dist"):  # AutoencoderTiny has no posterior
        mean = (encoded.latents.float() - shift) * scale
        return Latents(mean=mean, std=torch.zeros_like(mean))
    posterior = encoded.latent_dist
    return Latents(mean=(posterior.mean.float() - shift) * scale, std=posterior.std.float() * scale)
