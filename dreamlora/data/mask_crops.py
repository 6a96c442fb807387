"""Masks, cropped as their images are: how much of the loss every place of a training image has."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dreamlora.data.cache import CHECKED_WHOLE, TensorCache, Wanted, content_key
from dreamlora.data.images import ImageRecord
from dreamlora.data.mask_files import grey
from dreamlora.data.transforms import Preparations, Variant, crop, variants


def mask_plan(record: ImageRecord, how: Preparations) -> list[tuple[Wanted, Variant]]:
    """The cache entry of the mask of every variant of an image; empty if it has no mask."""
    if record.mask is None:
        return []
    own, content, digest = how[record], record.content_hash(), record.mask.content_hash()
    width, height = own.target(record.facts.size)
    layout = (("mask", "U8", (1, height, width)),)
    return [
        (
            Wanted(content_key("mask", digest, record.facts.size, variant, own.resolution, own.interpolation), layout),
            variant,
        )
        for variant in variants(record.facts.size, content, own)
    ]


def store_masks(records: Iterable[ImageRecord], how: Preparations, cache: TensorCache) -> None:
    """Crop the masks of images as the images are cropped, where the cache lacks them.

    Raises:
        UserError: see ``grey``.
    """
    for number, record in enumerate(records):
        plan = mask_plan(record, how)
        missing = set(cache.missing((wanted for wanted, _ in plan), thorough=number < CHECKED_WHOLE))
        if not missing or record.mask is None:
            continue
        mask = grey(record.mask).resize(record.facts.size)
        for wanted, variant in plan:
            if wanted.key in missing:
                cache.put(wanted.key, {"mask": torch.from_numpy(crop(mask, variant, how[record]))[None]})
