"""Images and prompts of a run become latents and embeddings, from the cache or by a model that is freed afterwards."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor, nn

from dreamlora.data.encode import Filling, encode_dataset, encode_prompts
from dreamlora.data.images import ImageRecord
from dreamlora.data.shown_prompts import Prompt, tokenized, with_pictures
from dreamlora.data.stores import LatentStore
from dreamlora.data.transforms import Preparations, to_tensor
from dreamlora.errors import is_of_memory
from dreamlora.interfaces import PICTURE, Components, Conditioning, Latents
from dreamlora.models.prompts import cut_prompts
from dreamlora.models.tiling import TILE, can_tile, tiled
from dreamlora.models.turns import HOST, TOGETHER
from dreamlora.processes import gather_lists, wait_for_everyone
from dreamlora.run.context import RunContext
from dreamlora.run.images import RunImages
from dreamlora.sampling.sampler import Asked, embedding
from dreamlora.training.stream import stack_conditioning

MOST_NAMED = 100
"""Texts that are told by name in the report."""
MOST_TOKENIZED = 1000
"""Captions whose token ids stay in memory while the text encoder trains."""

T = TypeVar("T")


class TilesNeededError(Exception):
    """Memory does not suffice, in any process, for encoding an image as a whole."""


Encode = Callable[[Sequence[str], Conditioning], Conditioning]
"""Captions, and what belongs to their images, to batched conditioning."""


def in_tiles_if_need_be(context: RunContext, work: Callable[[], T]) -> T:
    """What ``work`` gives, which encodes images; all of it in tiles where memory does not suffice for one as a whole.

    The latents of a run are all made in one way, and a resumed run makes them in the same.
    """
    try:
        return work()
    except TilesNeededError:
        pass  # what the exception holds is free again now
    context.config = replace(context.config, model=replace(context.config.model, vae_tiling=True))
    context.limits.tiles = True
    context.parts.free("vae")
    context.warn(
        "memory does not suffice for encoding whole images: they are encoded in tiles, which gives slightly other "
        "latents (--vae_tiling; --no_vae_tiling stops instead)"
    )
    return work()


def encode_images(context: RunContext, records: Sequence[ImageRecord], how: Preparations) -> LatentStore:
    """Latents of all images, made by the autoencoder where the cache lacks them.

    Raises:
        TilesNeededError: see ``in_tiles_if_need_be``; all processes raise it.
    """

    def encode(pixels: Tensor) -> Latents:
        vae = context.parts.get("vae")
        with tiled(vae["vae"], context.config.model.vae_tiling):
            return context.family.encode_images(vae, pixels)

    picture = context.family.text_pictures(context.source)

    def encode_conditioning(crop: np.ndarray) -> Conditioning:
        vae = context.parts.get("vae")
        with tiled(vae["vae"], context.config.model.vae_tiling):
            shown = context.family.encode_conditioning(vae, to_tensor(crop)[None])
        return {**shown, PICTURE: picture(Image.fromarray(crop))[None]} if picture else shown

    store = None
    try:
        store = encode_dataset(records, how, encode, latent_filling(context), encode_conditioning)
    except Exception as error:
        if not is_of_memory(error) or not _may_tile(context):
            raise
    if not all(gather_lists([store is not None])) or store is None:
        raise TilesNeededError
    return store


def _may_tile(context: RunContext) -> bool:
    return context.config.model.vae_tiling is None and can_tile(context.parts.get("vae")["vae"])


def latent_filling(context: RunContext) -> Filling:
    """How the cache is filled with latents."""
    return replace(
        context.filling(dtype="float32", **({"tiles": TILE} if context.config.model.vae_tiling else {})),
        latents=context.family.latent_size(context.source),
        describe=context.family.describe_views,
    )


def encode_texts(context: RunContext, prompts: Iterable[Prompt]) -> Encode:
    """Prompts to embeddings, made by the text encoder where the cache lacks them; it is freed afterwards.

    A prompt that was not among ``prompts``, nor in the cache, is a UserError.
    """
    encode = _encoded(context, prompts, context.family.encode_tokens)
    context.parts.free("text")
    return encode


def encode_frozen(context: RunContext, prompts: Iterable[Prompt], text: Components) -> Encode:
    """Prompts to what the encoders that never train make of them, and token ids for the one that does.

    The frozen ones are taken out of ``text`` afterwards. A prompt that was not among ``prompts``, nor in the cache, is
    a UserError.
    """
    frozen = [name for name, part in text.items() if isinstance(part, nn.Module)]
    frozen = [name for name in frozen if name not in context.family.TEXT_ENCODERS]
    if not frozen:
        return _tokenized(context, text)
    own = {"new_tokens": " ".join(tokens)} if (tokens := context.config.tokens.new_tokens) else {}
    encode = _encoded(context, prompts, context.family.encode_frozen, part="frozen", **own)
    context.parts.forget_frozen_text()
    return encode


def _encoded(
    context: RunContext,
    prompts: Iterable[Prompt],
    encoder: Callable[[Components, Conditioning], Conditioning],
    **key_parts: str,
) -> Encode:
    length = prompt_length(context)

    def encode(prompts: list[Prompt]) -> Conditioning:
        text = context.parts.get("text")
        return encoder(text, tokenized(context.family, text, prompts, length))

    parts, own = context.parts, context.source.text_encoder_precision
    kept = {**key_parts, **({"text_encoder_precision": own} if own else {})}
    if parts.text_device != parts.device:
        kept["text_encoder_device"] = parts.text_device.type  # it rounds otherwise, as TF32 does
    filling = replace(
        context.filling(dtype=context.accelerator.mixed_precision, length=length, **kept),
        length_axes=context.family.LENGTH_AXES,
        in_turns=parts.in_turns,
        together=1 if parts.text_device == HOST else TOGETHER,
    )
    table = encode_prompts(prompts, encode, filling)
    wait_for_everyone()

    def encoded(captions: Sequence[str], views: Conditioning) -> Conditioning:
        rows = [table[prompt] for prompt in with_pictures(captions, views)]
        return stack_conditioning(rows, context.family.LENGTH_AXES)

    return encoded


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
    vectors = {new.token: new.vectors for new in context.config.tokens.tokens}
    texts_alone = (text for _, text in captions)
    limit, cut = cut_prompts(context.family, context.source, texts_alone, prompt_length(context), vectors)
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


def _tokenized(context: RunContext, text: Components) -> Encode:
    """Prompts to token ids, where all text encoders train."""

    @functools.lru_cache(maxsize=MOST_TOKENIZED)
    def tokens(caption: str) -> Conditioning:
        return context.family.tokenize(text, [caption], prompt_length(context))

    return lambda captions, views: stack_conditioning([tokens(each) for each in captions], context.family.LENGTH_AXES)


def prompt_length(context: RunContext) -> int | None:
    """Tokens of a prompt, by the option that the family goes by."""
    length: int | None = getattr(context.config.data, context.family.PROMPT_LENGTH)
    return length


def pipeline_inputs(context: RunContext, encode: Encode, text: Components | None) -> Asked:
    """Prompts to keyword arguments of the pipeline: embeddings on the device, with negative ones under guidance.

    Args:
        context: for device, options and family.
        encode: prompts to embeddings, or to token ids.
        text: the text components, if a text encoder trains.
    """
    device = context.accelerator.device

    def conditioning(prompts: Sequence[str], views: Conditioning) -> Conditioning:
        encoded = {name: value.to(device) for name, value in encode(prompts, views).items()}
        return context.family.encode_tokens(text, encoded) if text else encoded

    return embedding(context.guidance(context.config.sample.negative_prompt), conditioning)
