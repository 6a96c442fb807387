"""``--vram``: what it chooses, by numbers alone; and that a training has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dreamlora.cli.parse import parse_run
from dreamlora.errors import UserError
from dreamlora.run import vram
from dreamlora.run.vram import Means

PLAIN = {
    "gradient_checkpointing": False,
    "base_precision": None,
    "offload_blocks": 0,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "text_encoder_precision": None,
    "text_encoder_device": None,
}
MEANS = Means(offloaded=40, words=("int8", "nf4"), text_words=("int8",))
SIZES = {None: 100, "bf16": 100, "fp8": 50, "int8": 50, "nf4": 25}


def needed(options: Mapping[str, Any], start: Mapping[str, Any] = PLAIN) -> int:
    """Of a model of 50 blocks and 100 bytes: 20 for a sample, 2 with checkpointing."""
    now = {**start, **options}
    weights = SIZES[now["base_precision"]] * (50 - now["offload_blocks"]) // 50
    return weights + now["train_batch_size"] * (2 if now["gradient_checkpointing"] else 20)


CHECKPOINTED = {"gradient_checkpointing": True}
ALONE = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
CHOICES = [
    (180, {}),
    (179, CHECKPOINTED),
    (107, {**CHECKPOINTED, "train_batch_size": 2, "gradient_accumulation_steps": 2}),
    (102, {**CHECKPOINTED, **ALONE}),
    (101, {**CHECKPOINTED, "base_precision": "int8"}),
    (52, {**CHECKPOINTED, "base_precision": "int8", **ALONE}),
    (51, {**CHECKPOINTED, "base_precision": "int8", "offload_blocks": 10}),
    (12, {**CHECKPOINTED, "base_precision": "int8", "offload_blocks": 40, **ALONE}),
    (7, {**CHECKPOINTED, "base_precision": "nf4", "offload_blocks": 40, **ALONE}),
]


@pytest.mark.parametrize(("room", "chosen"), CHOICES)
def test_what_costs_least_quality_is_tried_first(room: int, chosen: dict[str, Any]) -> None:
    assert vram.first_that_fits(vram.base_options(PLAIN, (), MEANS), needed, room) == chosen
    assert needed(chosen) <= room


def test_what_comes_closest_is_told_where_nothing_fits() -> None:
    least = vram.first_that_fits(vram.base_options(PLAIN, (), MEANS), needed, 1)
    assert needed(least) == min(map(needed, vram.base_options(PLAIN, (), MEANS)))


@pytest.mark.parametrize("flag", [flag for flag in PLAIN if not flag.startswith("text")])
def test_given_flags_stay(flag: str) -> None:
    given = {"base_precision": "fp8", "train_batch_size": 4, "offload_blocks": 8, "gradient_accumulation_steps": 1}
    start = {**PLAIN, "gradient_checkpointing": flag == "offload_blocks", flag: given.get(flag, False)}
    candidates = list(vram.base_options(start, {flag}, MEANS))
    assert len(candidates) > 1 and not any(flag in options for options in candidates)
    products = {
        {**start, **each}["train_batch_size"] * {**start, **each}["gradient_accumulation_steps"] for each in candidates
    }
    assert products == {4}


def test_nothing_waits_without_checkpointing() -> None:
    candidates = vram.base_options(PLAIN, {"gradient_checkpointing"}, MEANS)
    assert not any(options.get("offload_blocks") for options in candidates)


def test_no_fewer_blocks_wait_than_the_ring_holds_or_were_asked_for() -> None:
    few = Means(offloaded=4, words=MEANS.words)
    assert {options.get("offload_blocks", 0) for options in vram.base_options(PLAIN, (), few)} == {0, 3, 4}
    start = {**PLAIN, **CHECKPOINTED, "offload_blocks": 20}
    assert {{**start, **each}["offload_blocks"] for each in vram.base_options(start, (), MEANS)} == {20, 30, 40}


def test_text_encoders_are_rounded_before_they_are_slow() -> None:
    assert list(vram.text_options(PLAIN, (), MEANS)) == [
        {},
        {"text_encoder_precision": "int8"},
        {"text_encoder_device": "cpu"},
    ]
    assert list(vram.text_options(PLAIN, {"text_encoder_precision", "text_encoder_device"}, MEANS)) == [{}]
    assert {"text_encoder_device": "cpu"} not in vram.text_options(PLAIN, (), Means(text_on_cpu=False))


@pytest.mark.parametrize("wrong", ["3.9", "0", "-8", "nan", "inf", "8GB", "all", ""])
def test_no_amount_of_memory(wrong: str) -> None:
    with pytest.raises(UserError, match="--vram must be gigabytes, 4 or more, such as 12, or auto"):
        parse_run(["--vram", wrong])


def test_words_are_flags() -> None:
    assert vram.in_words({**CHECKPOINTED, **ALONE}) == (
        "--gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 4"
    )
