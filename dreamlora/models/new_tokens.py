"""New tokens in CLIP text encoders: tokenizers that know them, and embeddings that are parameters of their own.

Only the new rows train. The matrix of the model's own embeddings stays as it is, in its own precision; the rows are
float32, like a LoRA. What comes out is what diffusers' ``load_textual_inversion`` makes of the saved vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from dreamlora.config.new_tokens import NewToken, pieces_of
from dreamlora.errors import UserError
from dreamlora.interfaces import Components
from dreamlora.lora import embeddings
from dreamlora.randomness import generator

Vectors: TypeAlias = "dict[str, dict[str, Tensor]]"
"""By token, and by the component name of a text encoder: ``[n, d]`` float32, on the CPU."""

RETURN = 0.1
"""Exponent of the way back to a vector's first length that every step goes, as in diffusers' advanced scripts."""


def tokenizer_of(encoder: str) -> str:
    """Component name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def extend(tokenizer: Any, vectors: Mapping[str, int]) -> None:
    """Make a tokenizer know new tokens, as ``load_textual_inversion`` does.

    Args:
        tokenizer: CLIP's; it is changed.
        vectors: how many each token has.

    Raises:
        UserError: it knows one of them.
    """
    for token, count in vectors.items():
        pieces = pieces_of(token, count)
        known = tokenizer.get_vocab()
        if taken := next((piece for piece in pieces if piece in known), None):
            raise UserError(
                f"the new token {token}: the text encoder has {taken} among its own tokens, which other words are made "
                f"of: give another name, such as <{token.strip('<>')}>"
            )
        tokenizer.add_tokens(pieces)


def with_all_vectors(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts with every vector of their new tokens, as stock pipelines have it: "sks" becomes "sks sks_1"."""
    if not any(name.endswith("_1") for name in tokenizer.added_tokens_encoder):
        return list(prompts)
    converted: list[str] = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    return converted


def check(tokenizers: Mapping[str, Any], tokens: Sequence[NewToken]) -> None:
    """Nothing, if these can be new tokens, and start from the words that are named.

    Args:
        tokenizers: of the encoders that get them, by any names; copies are changed.
        tokens: what is asked for.

    Raises:
        UserError: a tokenizer has one of them already; or a word is several tokens, or none.
    """
    for tokenizer in tokenizers.values():
        extend(copy.deepcopy(tokenizer), {new.token: new.vectors for new in tokens})
        for new in tokens:
            _first_ids(tokenizer, new)


def starts(text: Components, encoders: Sequence[str], tokens: Sequence[NewToken], seed: int) -> Vectors:
    """What the embeddings start from: those of their words; or normal numbers, as large as the model's own embeddings.

    Args:
        text: the text components, without the new tokens.
        encoders: names of those that get them.
        tokens: what is asked for.
        seed: of the run.

    Raises:
        UserError: a word is several tokens, or none.
    """
    found: Vectors = {new.token: {} for new in tokens}
    for name in encoders:
        weight = text[name].get_input_embeddings().weight.detach()
        for new in tokens:
            if new.words:
                ids = _first_ids(text[tokenizer_of(name)], new)
                rows = weight[[ids[number % len(ids)] for number in range(new.vectors)]].float().cpu()
            else:
                draws = generator(seed, "new token", name, new.token)
                rows = torch.randn(new.vectors, weight.shape[1], generator=draws) * float(weight.float().std())
            found[new.token][name] = rows
    return found


def _first_ids(tokenizer: Any, new: NewToken) -> list[int]:
    """The tokens that its words are."""
    ids = []
    for word in new.words:
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        if len(pieces) != 1:
            parts = " ".join(tokenizer.convert_ids_to_tokens(pieces)) or "nothing"
            raise UserError(
                f"--new_tokens {new.token}: the text encoder reads {word!r} as {len(pieces)} tokens ({parts}), and an "
                "embedding starts from one: give a simpler word, or several words with commas for several vectors"
            )
        ids.append(pieces[0])
    return ids


class TokenEmbeddings(nn.Module):
    """Embeddings of the new tokens of one text encoder.

    Attributes:
        rows: ``[n, d]`` float32, in the order of the tokens; they train.
        start: what they were at first.
        scale: mean norm of the model's own embeddings.
    """

    start: Tensor

    def __init__(self, start: Tensor, own: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(start.to(own.device, torch.float32, copy=True))
        self.register_buffer("start", self.rows.detach().clone(), persistent=False)
        self.scale = float(own.detach().float().norm(dim=1).mean())

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the lengths of the vectors, which training makes ever larger, a little back to those of the start."""
        if self.rows.requires_grad:
            ratio = self.start.norm(dim=1, keepdim=True) / self.rows.norm(dim=1, keepdim=True)
            self.rows.mul_(torch.where(ratio.isfinite(), ratio, 1.0) ** RETURN)


class ExtendedEmbedding(nn.Module):
    """An embedding layer whose tokens from ``first`` on have rows of their own.

    The rows are no parameters of this module: they are not a part of the text encoder, whose LoRA trains otherwise.

    Args:
        own: the model's layer.
        tokens: with a row for each token from ``first`` on.
        first: number of the first new token.
    """

    def __init__(self, own: nn.Embedding, tokens: TokenEmbeddings, first: int) -> None:
        super().__init__()
        self.own = own
        self._first = first
        self._tokens = (tokens,)  # nn.Module does not look into a tuple

    @property
    def weight(self) -> Tensor:
        """The model's own."""
        return self.own.weight

    def forward(self, ids: Tensor) -> Tensor:
        """``[..., d]`` in the precision of the model's own, of token ids ``[...]``."""
        known = self.own(ids.clamp(max=self._first - 1))
        rows = self._tokens[0].rows.to(known.device)  # of an encoder that has moved without them
        new = nn.functional.embedding((ids - self._first).clamp(min=0), rows)
        return torch.where((ids >= self._first)[..., None], new.to(known.dtype), known)


def put_in(text: Components, vectors: Vectors) -> dict[str, TokenEmbeddings]:
    """Give tokenizers and text encoders new tokens; by encoder what trains of them.

    Args:
        text: the text components; tokenizers and encoders are changed.
        vectors: that the tokens have at first.

    Raises:
        UserError: see ``extend``; or a vector is not as long as the encoder's own.
    """
    encoders = list(dict.fromkeys(name for each in vectors.values() for name in each))
    put: dict[str, TokenEmbeddings] = {}
    for name in encoders:
        encoder, tokenizer = text[name], text[tokenizer_of(name)]
        own, first = encoder.get_input_embeddings(), len(tokenizer)
        here = {token: each[name] for token, each in vectors.items() if name in each}
        for token, rows in here.items():
            if rows.shape[1] != own.weight.shape[1]:
                raise UserError(
                    f"the embedding of {token} has {rows.shape[1]} numbers, and those of this model's {name} have "
                    f"{own.weight.shape[1]}: was it made for another model?"
                )
        extend(tokenizer, {token: len(rows) for token, rows in here.items()})
        put[name] = TokenEmbeddings(torch.cat(list(here.values())), own.weight)
        encoder.set_input_embeddings(ExtendedEmbedding(own, put[name], first))
        pool_at_end(encoder, tokenizer)
    return put


@contextmanager
def put_for_a_while(text: Components, vectors: Vectors) -> Iterator[None]:
    """The text components know these tokens in here, and no others afterwards.

    Raises:
        UserError: see ``put_in``.
    """
    names = list(dict.fromkeys(name for each in vectors.values() for name in each))
    before = {tokenizer_of(name): text[tokenizer_of(name)] for name in names}
    layers = {name: text[name].get_input_embeddings() for name in names}
    text.update(copy.deepcopy(before))
    try:
        put_in(text, vectors)
        yield
    finally:
        text.update(before)
        for name, layer in layers.items():
            text[name].set_input_embeddings(layer)


def pool_at_end(encoder: Any, tokenizer: Any) -> bool:
    """Let an encoder find the end of a text by its token; whether it did otherwise.

    Configs of older CLIPs name 2 as that token. transformers then takes the highest number for the end, which a new
    token's is; for texts without one the two are the same.
    """
    astray = [module for module in encoder.modules() if getattr(module, "eos_token_id", None) == 2]
    for module in astray:
        module.eos_token_id = tokenizer.eos_token_id
    return bool(astray)


def load_embeddings(pipeline: Any, files: Sequence[Path], keys: Mapping[str, str]) -> None:
    """Load files of embeddings into a stock pipeline, as its user does.

    Args:
        keys: the family's ``EMBEDDING_KEYS``.

    Raises:
        UserError: see ``embeddings.read``.
    """
    for _, token, vectors in embeddings.read_all(files, keys):
        for name, rows in vectors.items():
            encoder, tokenizer = getattr(pipeline, name), getattr(pipeline, tokenizer_of(name))
            pipeline.load_textual_inversion(rows, token=token, tokenizer=tokenizer, text_encoder=encoder)
            pool_at_end(encoder, tokenizer)


def by_token(vectors: Mapping[str, int], put: Mapping[str, TokenEmbeddings]) -> Vectors:
    """What ``put_in`` gave, as it is now, token by token.

    Args:
        vectors: how many each token has, in the order in which they were put in.
        put: by encoder.
    """
    counts = list(vectors.values())
    split = {name: part.rows.detach().cpu().split(counts) for name, part in put.items()}
    return {token: {name: rows[number] for name, rows in split.items()} for number, token in enumerate(vectors)}
