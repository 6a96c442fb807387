"""Masks, cropped as their images are: how much of the loss every place of a training image has."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dreamlora.data.cache import CHECKED_WHOLE, TensorCache, content_key
from dreamlora.data.images import ImageRecord
from dreamlora.data.mask_files import grey
from dreamlora.data.transforms import Preparations, Variant, crop, variants


def mask_plan(record: ImageRecord, how: Preparations) -> list[tuple[str, Variant]]:
    """The cache key of the mask of every variant of an image; empty if it has no mask."""
    if record.mask is None:
        return []
    own, content, digest = how[record], record.content_hash(), record.mask.content_hash()
    return [
        (content_key("mask", digest, record.facts.size, variant, own.resolution, own.interpolation), variant)
        for variant in variants(record.facts.size, content, own)
    ]


def store_masks(records: Iterable[ImageRecord], how: Preparations, cache: TensorCache) -> None:
    """Crop the masks of images as the images are cropped, where the cache lacks them.

    Raises:
        UserError: see ``grey``.
    """
    for number, record in enumerate(records):
        plan = mask_plan(record, how)
        missing = set(cache.missing((key for key, _ in plan), thorough=number < CHECKED_WHOLE))
        if not missing or record.mask is None:
            continue
        mask = grey(record.mask).resize(record.facts.size)
        for key, variant in plan:
            if key in missing:
                cache.put(key, {"mask": torch.from_numpy(crop(mask, variant, how[record]))[None]})
