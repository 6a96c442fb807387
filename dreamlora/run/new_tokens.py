"""New tokens of a run (pivotal tuning): checked, put into the text encoders, trained at a rate of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dreamlora import registry
from dreamlora.config.new_tokens import NewToken
from dreamlora.config.rates import rate_outside_pairs
from dreamlora.errors import UserError
from dreamlora.interfaces import Components
from dreamlora.models import new_tokens
from dreamlora.models.loading import load_components
from dreamlora.models.new_tokens import tokenizer_of
from dreamlora.run.context import RunContext
from dreamlora.run.encoding import Encode
from dreamlora.run.images import RunImages
from dreamlora.training.loop import Predictor

_SHOWN = 100
"""Characters of a caption."""


def require(context: RunContext) -> None:
    """Nothing, if the model can have the new tokens that are asked for, and start them from their words.

    Raises:
        UserError: it cannot.
    """
    tokens, family = context.config.tokens.tokens, context.family
    if not tokens:
        return
    if not family.EMBEDDING_KEYS:
        able = [name for name in registry.names("families") if registry.load("families", name).EMBEDDING_KEYS]
        raise UserError(
            f"--new_tokens: {' and '.join(family.PIPELINES)} loads no embeddings of new tokens; the families "
            f"{', '.join(able)} do. Leave the flag out, and the token is read as the words that it is made of"
        )
    names = [tokenizer_of(encoder) for encoder in family.EMBEDDING_KEYS]
    classes = {name: family.PARTS["text"][name] for name in names}
    new_tokens.check(load_components(context.source, classes, None, family.OPTIONAL), tokens)


def warn_of_use(context: RunContext, pictures: RunImages) -> None:
    """Tell of tokens that no caption has, and of captions that have one otherwise than meant. Main process only."""
    for problem in _odd_uses(context, pictures):
        context.warn(problem)


def _odd_uses(context: RunContext, pictures: RunImages) -> Iterator[str]:
    uses = {new: _Uses(new) for new in context.config.tokens.tokens}
    for record in pictures.train if uses else ():
        for caption in record.captions:
            for use in uses.values():
                use.count(caption)
    for new, use in uses.items():
        if not use.found:
            yield (
                f"--new_tokens: no caption has {new.token}, so its embedding learns nothing: write it into the "
                "captions, or into --instance_prompt"
            )
        if use.inside:
            yield (
                f"--new_tokens: {use.inside} captions have {new.token} inside another word (such as "
                f"{use.example!r}), which is read as the new token too: give a name such as <{new.token}>"
            )
        if use.capital and new.vectors > 1:
            yield (
                f"--new_tokens: {use.capital} captions write {new.token} in capitals (such as {use.example!r}), "
                "where pipelines read only the first of its vectors: write it as in --new_tokens"
            )


class _Uses:
    """In how many captions a token stands, inside another word, and in capitals alone; one of the last two kinds."""

    def __init__(self, new: NewToken) -> None:
        self.found = self.inside = self.capital = 0
        self.example = ""
        self._token = new.token
        self._within = (
            re.compile(rf"\w{re.escape(new.token)}|{re.escape(new.token)}\w") if new.token.isalnum() else None
        )

    def count(self, caption: str) -> None:
        lowered = caption.lower()
        if self._token not in lowered:
            return
        inside, capital = bool(self._within and self._within.search(lowered)), self._token not in caption
        self.found, self.inside, self.capital = self.found + 1, self.inside + inside, self.capital + capital
        if (inside or capital) and not self.example:
            self.example = caption[:_SHOWN]


def put_in(context: RunContext, text: Components) -> None:
    """Give the text encoders of a run its new tokens, as ``context.new_tokens``; they stand at their start, or where
    the LoRA that is gone on from has them.
    """
    config, encoders = context.config, list(context.family.EMBEDDING_KEYS)
    if config.tokens.new_tokens:
        vectors = new_tokens.starts(text, encoders, config.tokens.tokens, config.train.seed)
        context.new_tokens = new_tokens.put_in(text, vectors)
        if context.predecessor:
            begun = {**vectors, **context.predecessor.embeddings}
            for name, part in context.new_tokens.items():
                part.rows.data.copy_(torch.cat([begun[token][name] for token in vectors]))


def param_group(context: RunContext, model: Predictor) -> list[dict[str, Any]]:
    """The optimizer's group of the embeddings, which are no pairs; none without new tokens."""
    options, optim = context.config.tokens, context.config.optim
    if not len(model.new_tokens):
        return []
    rate, rate_of_lora = options.new_tokens_lr, float(optim.learning_rate or 0.0)  # a number by now
    return [
        {
            "params": [part.rows for part in context.new_tokens.values()],
            "names": [f"new_tokens.{name}" for name in context.new_tokens],
            "lora_pairs": False,
            "lr": rate_outside_pairs(optim, rate_of_lora) if rate is None else rate,
            "own_lr": rate is not None,
            "weight_decay": options.new_tokens_weight_decay,
        }
    ]


def settler(context: RunContext) -> Callable[[], None]:
    """What brings the embeddings' lengths back after every update. Where parameters are an average of a path in
    disguise (schedule-free methods), nothing may change them but the optimizer.
    """
    averages = getattr(registry.load("optimizers", context.config.optim.optimizer), "OWN_SCHEDULE", False)
    parts = [] if averages else list(context.new_tokens.values())

    def settle() -> None:
        for part in parts:
            part.settle()

    return settle


@torch.no_grad()
def warn_of_pooling(context: RunContext, text: Components, encode: Encode) -> None:
    """Tell of models whose prompts diffusers sums up otherwise than other programs, once they have new tokens.

    Args:
        text: the text components.
        encode: prompts to token ids.
    """
    odd = [name for name in context.new_tokens if text[name].config.eos_token_id == 2]
    if odd and any(
        "pooled" in name for name in context.family.encode_tokens(text, encode([context.caption_plan.dropped], {}))
    ):
        context.warn(
            f"the config of {' and '.join(odd)} names a wrong token as the end of a text, so that diffusers sums up a "
            "prompt at its new token, where training and other programs do at its end: docs/training.md (New tokens) "
            "has the line that mends it in a pipeline of your own"
        )
