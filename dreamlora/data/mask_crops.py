"""Masks, cropped as their images are: how much of the loss every place of a training image has."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dreamlora.data.cache import TensorCache, content_key
from dreamlora.data.images import ImageRecord
from dreamlora.data.transforms import Preparations, Variant, crop, variants
from dreamlora.errors import UserError


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
        UserError: a mask is black everywhere.
    """
    for record in records:
        plan = mask_plan(record, how)
        missing = set(cache.missing(key for key, _ in plan))
        if not missing or record.mask is None:
            continue
        mask = record.mask.open().convert("L").resize(record.facts.size)
        if mask.getextrema() == (0, 0):
            raise UserError(f"the mask {record.mask.where} is black everywhere: nothing of its image would be learned")
        for key, variant in plan:
            if key in missing:
                cache.put(key, {"mask": torch.from_numpy(crop(mask, variant, how[record]))[None]})
