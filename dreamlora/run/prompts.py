"""All prompts that a run asks the text encoder for, before the denoiser is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from dreamlora.data.shown_prompts import Prompt, with_pictures
from dreamlora.data.stores import LatentStore
from dreamlora.run.context import RunContext
from dreamlora.run.images import RunImages


def all_prompts(context: RunContext, pictures: RunImages) -> Iterator[Prompt]:
    """Those of models whose text encoders see prompts alone; they may repeat."""
    plan = context.caption_plan
    return itertools.chain(
        (plan.dropped, _negative(context)),
        (*pictures.prompts, *pictures.eval_prompts),
        (text for record in pictures.train for text in plan.texts(record.captions)),
        (record.caption for record in itertools.chain(pictures.measured, pictures.learned)),
        (caption for record in pictures.classes for caption in record.captions),
    )


def all_shown_prompts(
    context: RunContext, pictures: RunImages, store: LatentStore, others: Sequence[LatentStore]
) -> Iterator[Prompt]:
    """Those of models whose text encoders see an image with each.

    Args:
        store: the images that are trained on.
        others: images to measure on.
    """
    plan, guidance = context.caption_plan, context.guidance(context.config.sample.negative_prompt)
    for prompt in (*pictures.prompts, *pictures.eval_prompts):
        yield from with_pictures([prompt, _negative(context)], guidance.views([prompt] * 2))
        yield from with_pictures([prompt], store.view(0, 0))  # as the check at the end asks
    for index in range(len(store)):
        texts = (plan.dropped, *plan.texts(store.captions[index]))
        for variant in range(store.count(index)):
            view = store.view(index, variant)
            yield from (prompt for text in texts for prompt in with_pictures([text], view))
    for other in others:
        for index in range(len(other)):
            yield from with_pictures([other.captions[index][0]], other.view(index, 0))


def _negative(context: RunContext) -> str:
    return context.guidance(context.config.sample.negative_prompt).encoded_negative or ""
