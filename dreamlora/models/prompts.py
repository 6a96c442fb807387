"""How many of a model's prompts are too long for its text encoder, which sees no more than their beginnings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dreamlora.interfaces import Family, ModelSource
from dreamlora.models.loading import load_components
from dreamlora.models.new_tokens import extend, tokenizer_of

AT_A_TIME = 1000


def cut_prompts(
    family: Family,
    source: ModelSource,
    prompts: Iterable[str],
    max_length: int | None,
    new_tokens: Mapping[str, int] | None = None,
) -> tuple[int, Iterator[bool]]:
    """The number of tokens that count of a prompt, and for every prompt whether it has more.

    Only the tokenizer is loaded; memory does not grow with the number of prompts.

    Args:
        new_tokens: how many vectors each of them has.

    Raises:
        UserError: ``max_length`` is none that the text encoder can take.
    """
    tokenizer = _tokenizer(family, source)
    if family.PROMPT_TOKENIZER in map(tokenizer_of, family.EMBEDDING_KEYS):
        extend(tokenizer, new_tokens or {})
    limit = family.prompt_limit(tokenizer, max_length)

    def cut() -> Iterator[bool]:
        remaining = iter(prompts)
        while some := list(itertools.islice(remaining, AT_A_TIME)):
            yield from (count > limit for count in family.count_tokens(tokenizer, some))

    return limit, cut()


def _tokenizer(family: Family, source: ModelSource) -> Any:
    """The family's ``PROMPT_TOKENIZER``; where a pipeline lacks it, the first that there is."""
    classes = family.PARTS["text"]
    names = (family.PROMPT_TOKENIZER, *(name for name in classes if name.startswith("tokenizer")))
    loaded = (load_components(source, {name: classes[name]}, None, family.OPTIONAL)[name] for name in names)
    return next(tokenizer for tokenizer in loaded if tokenizer is not None)
