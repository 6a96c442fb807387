"""How many of a model's prompts are too long for its text encoder, which sees no more than their beginnings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from dreamlora.interfaces import Family, ModelSource
from dreamlora.models.loading import load_components

AT_A_TIME = 1000


def cut_prompts(
    family: Family, source: ModelSource, prompts: Iterable[str], max_length: int | None
) -> tuple[int, Iterator[bool]]:
    """The number of tokens that count of a prompt, and for every prompt whether it has more.

    Only the tokenizer is loaded; memory does not grow with the number of prompts.

    Raises:
        UserError: ``max_length`` is none that the text encoder can take.
    """
    name = family.PROMPT_TOKENIZER
    tokenizer = load_components(source, {name: family.PARTS["text"][name]}, None)[name]
    limit = family.prompt_limit(tokenizer, max_length)

    def cut() -> Iterator[bool]:
        remaining = iter(prompts)
        while some := list(itertools.islice(remaining, AT_A_TIME)):
            yield from (count > limit for count in family.count_tokens(tokenizer, some))

    return limit, cut()
