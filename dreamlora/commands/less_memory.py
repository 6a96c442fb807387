"""Which flags of ``sample`` and ``evaluate`` take less memory, where it did not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.memory import Shortage
from dreamlora.run.remedies import in_a_sentence, smaller

if TYPE_CHECKING:
    from dreamlora.commands.under_test import UnderTest


def advice(config: SampleConfig, under_test: UnderTest | None, shortage: Shortage) -> str:
    """What to try, in a sentence without its end.

    Args:
        config: the flags.
        under_test: the model, once it is known what it is.
    """
    return in_a_sentence(list(_flags(config, under_test, shortage)))


def _flags(config: SampleConfig, under_test: UnderTest | None, shortage: Shortage) -> Iterator[str]:
    if shortage.stage == "image metrics" or under_test is None:
        yield "a smaller --clip_model or --dino_model"
        return
    source, device = under_test.source, under_test.parts.device.type
    if shortage.stage == "evaluation loss" and getattr(config, "eval_batch_size", 1) > 1:
        yield "--eval_batch_size 1"
    if under_test.precision == "float32":
        yield "--mixed_precision bf16"
    yield from smaller("text_encoder_precision", source.text_encoder_precision, device)
    yield from smaller("base_precision", source.base_precision, device)
    if shortage.stage != "evaluation loss":
        yield "a smaller --resolution"
