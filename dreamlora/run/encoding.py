"""Images and prompts of a run become latents and embeddings, from the cache or by a model that is freed afterwards."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from dreamlora.data.encode import LatentSize, encode_dataset, encode_prompts
from dreamlora.data.images import ImageRecord
from dreamlora.data.stores import LatentStore
from dreamlora.data.transforms import Preparations
from dreamlora.interfaces import Components, Conditioning, Latents, ModelSource
from dreamlora.models.loading import read_config
from dreamlora.models.prompts import cut_prompts
from dreamlora.processes import wait_for_everyone
from dreamlora.run.context import RunContext
from dreamlora.run.images import RunImages
from dreamlora.sampling.sampler import Embed, embedding
from dreamlora.training.stream import stack_conditioning

MOST_NAMED = 100
"""Texts that are told by name in the report."""
MOST_TOKENIZED = 1000
"""Captions whose token ids stay in memory while the text encoder trains."""

_BLOCKS = {"AutoencoderKL": "block_out_channels", "AutoencoderTiny": "encoder_block_out_channels"}
"""Each block but one halves the sides."""

Encode = Callable[[Sequence[str]], Conditioning]
"""Captions to batched conditioning."""


def encode_images(context: RunContext, records: Sequence[ImageRecord], how: Preparations) -> LatentStore:
    """Latents of all images, made by the autoencoder where the cache lacks them."""

    def encode(pixels: Tensor) -> Latents:
        return context.family.encode_images(context.parts.get("vae"), pixels)

    filling = replace(context.filling(dtype="float32"), latents=_latent_size(context.source))
    store = encode_dataset(records, how, encode, filling)
    wait_for_everyone()
    return store


def _latent_size(source: ModelSource) -> LatentSize | None:
    """What the autoencoder's settings say of its latents; None for a class that is not known here."""
    settings = read_config(source, "vae")
    blocks = settings.get(_BLOCKS.get(settings.get("_class_name", ""), ""))
    channels = settings.get("latent_channels")
    return LatentSize(channels, 2 ** (len(blocks) - 1)) if blocks and isinstance(channels, int) else None


def encode_texts(context: RunContext, prompts: Iterable[str]) -> Encode:
    """Prompts to embeddings, made by the text encoder where the cache lacks them; it is freed afterwards.

    A prompt that was not among ``prompts``, nor in the cache, is a UserError.
    """
    length = prompt_length(context)

    def encode(texts: list[str]) -> Conditioning:
        text = context.parts.get("text")
        return context.family.encode_tokens(text, context.family.tokenize(text, texts, length))

    table = encode_prompts(prompts, encode, context.filling(dtype=context.accelerator.mixed_precision, length=length))
    wait_for_everyone()
    context.parts.free("text")
    return lambda captions: stack_conditioning([table[caption] for caption in captions])


def warn_of_cut_texts(context: RunContext, pictures: RunImages) -> None:
    """Tell how many captions and prompts are longer than the text encoder reads; in the report, which ones.

    Main process only.

    Raises:
        UserError: the prompt length that was asked for is none that the text encoder can take.
    """
    records = itertools.chain(pictures.train, pictures.held_out)
    prompts = dict.fromkeys((*pictures.prompts, *pictures.eval_prompts))
    texts = itertools.chain(
        ((f"of {record.name}", caption) for record in records for caption in record.captions),
        ((repr(prompt), prompt) for prompt in prompts),
    )
    names, captions = itertools.tee(texts)
    limit, cut = cut_prompts(context.family, context.source, (text for _, text in captions), prompt_length(context))
    count, named = 0, list[str]()
    for (name, _), is_cut in zip(names, cut, strict=True):
        count += is_cut
        if is_cut and len(named) < MOST_NAMED:
            named.append(name)
    if count:
        more = f", and {count - len(named)} more" if count > len(named) else ""
        longer = {"tokenizer_max_length": "; a larger --max_token_length reads more of them"}
        many = "caption or prompt has" if count == 1 else "captions or prompts have"
        context.warn(
            f"{count} {many} more than {limit} tokens: what is beyond does not count"
            + longer.get(context.family.PROMPT_LENGTH, ""),
            f" ({', '.join(named)}{more})",
        )


def tokenized(context: RunContext, text: Components) -> Encode:
    """Prompts to token ids, for a text encoder that trains."""

    @functools.lru_cache(maxsize=MOST_TOKENIZED)
    def tokens(caption: str) -> Conditioning:
        return context.family.tokenize(text, [caption], prompt_length(context))

    return lambda captions: stack_conditioning([tokens(caption) for caption in captions])


def prompt_length(context: RunContext) -> int | None:
    """Tokens of a prompt, by the option that the family goes by."""
    length: int | None = getattr(context.config.data, context.family.PROMPT_LENGTH)
    return length


def pipeline_inputs(context: RunContext, encode: Encode, text: Components | None) -> Embed:
    """Prompts to keyword arguments of the pipeline: embeddings on the device, with negative ones under guidance.

    Args:
        context: for device, options and family.
        encode: prompts to embeddings, or to token ids.
        text: the text components, if a text encoder trains.
    """
    device = context.accelerator.device
    sample = context.config.sample

    def conditioning(prompts: Sequence[str]) -> Conditioning:
        encoded = {name: value.to(device) for name, value in encode(prompts).items()}
        return context.family.encode_tokens(text, encoded) if text else encoded

    return embedding(context.family, conditioning, sample.sample_guidance_scale or 0, sample.negative_prompt)
