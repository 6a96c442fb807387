"""Images that do not fit into memory all at once, or not as a whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dreamlora.sampling.limits import CallLimits
from dreamlora.sampling.sampler import SamplePlan, draw
from tests.sampling.test_sampler import assert_same, pixels, small_plan, texts


@pytest.fixture(scope="module")
def pipeline(sd_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(sd_folder)


@contextmanager
def holding(pipeline: Any, images: int, tiles: bool = False) -> Iterator[list[int]]:
    """Memory for a denoiser's batch of so many images (twice that under guidance); and for tiles alone. Gives the
    batches that were tried.
    """
    tried: list[int] = []

    def before(module: Any, given: Any, named: Any) -> None:
        tried.append(len(given[0]) // 2)
        if tried[-1] > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def before_decoding(module: Any, given: Any) -> None:
        if tiles and not pipeline.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")

    hooks = [
        pipeline.unet.register_forward_pre_hook(before, with_kwargs=True),
        pipeline.vae.decoder.register_forward_pre_hook(before_decoding),
    ]
    try:
        yield tried
    finally:
        for hook in hooks:
            hook.remove()


def plan(**changes: Any) -> SamplePlan:
    return small_plan(num_images_per_prompt=4, width=16, height=16, **changes)


def test_the_batch_is_halved_once_and_the_images_are_the_same(
    pipeline: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    alone = pixels(pipeline, plan(batch_size=1))
    four = plan(batch_size=4)
    with caplog.at_level(logging.INFO), holding(pipeline, 1) as tried:
        drawn = pixels(pipeline, four)
        once = list(tried)
        again = pixels(pipeline, four)
    assert_same(drawn, alone)
    assert_same(again, alone)
    assert once[:2] == [4, 2] and set(once[2:]) == {1}, "what did not fit is not tried again"
    assert set(tried[len(once) :]) == {1}, "nor at the next occasion"
    assert [record.message for record in caplog.records] == [
        "memory does not suffice for 4 images at a time: from now on 2 are drawn",
        "memory does not suffice for 2 images at a time: from now on 1 are drawn",
    ]


def test_an_image_that_does_not_fit_is_decoded_in_tiles(
    pipeline: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), holding(pipeline, 4, tiles=True):
        drawn = list(draw(pipeline, plan(batch_size=2), texts))
    assert len(drawn) == 8 and not pipeline.vae.use_tiling, "outside of drawing it is as it was"
    assert caplog.records[-1].message.endswith("from now on the autoencoder decodes large ones in tiles")


@pytest.mark.parametrize("tiles", [None, False])
def test_what_cannot_fit_is_an_error(pipeline: StableDiffusionPipeline, tiles: bool | None) -> None:
    with holding(pipeline, 0), pytest.raises(torch.OutOfMemoryError):
        list(draw(pipeline, plan(batch_size=2, limits=CallLimits(tiles=tiles)), texts))


def test_other_errors_are_not_tried_again(pipeline: StableDiffusionPipeline) -> None:
    calls = []

    def wrong(prompts: list[str]) -> dict[str, Any]:
        calls.append(prompts)
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        list(draw(pipeline, plan(batch_size=4), wrong))
    assert len(calls) == 1
