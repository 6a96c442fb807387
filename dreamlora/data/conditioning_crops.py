"""The images before an edit, cropped as those after it and encoded: what models that edit are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from dreamlora.data.buckets import Size
from dreamlora.data.cache import CHECKED_WHOLE, KeyPart, TensorCache, Wanted, content_key, is_finite
from dreamlora.data.images import ImageRecord
from dreamlora.data.transforms import Preparations, Variant, crop, resized, variants
from dreamlora.errors import UserError
from dreamlora.interfaces import Conditioning


def alike(variant: Variant, size: Size, other: Size) -> Variant:
    """The crop of an image of size ``other`` that lies where ``variant`` lies in one of ``size``."""
    left, top, right, bottom = variant.crop_box
    target = right - left, bottom - top
    corner = []
    for at, side, wanted, whole in zip((left, top), resized(size, target), target, resized(other, target), strict=True):
        share = at / (side - wanted) if side > wanted else 0.5
        corner.append(round(share * (whole - wanted)))
    x, y = corner
    return Variant((x, y, x + target[0], y + target[1]), variant.flipped)


def conditioning_plan(
    record: ImageRecord, how: Preparations, key_parts: Mapping[str, KeyPart]
) -> list[tuple[Wanted, Variant]]:
    """The cache entry of what belongs to every variant of an image; empty if it has no conditioning image."""
    if record.conditioning is None:
        return []
    own, facts, shown = how[record], record.facts, record.conditioning.facts
    crops = [alike(each, facts.size, shown.size) for each in variants(facts.size, facts.content_hash, own)]
    about = (own.resolution, own.interpolation, dict(key_parts))
    return [(Wanted(content_key("conditioning", shown.content_hash, each, *about), None), each) for each in crops]


def store_conditioning(
    records: Iterable[ImageRecord],
    how: Preparations,
    encode: Callable[[np.ndarray], Conditioning],
    cache: TensorCache,
    key_parts: Mapping[str, KeyPart],
) -> None:
    """Encode the conditioning images of images as these are cropped, where the cache lacks them.

    Args:
        records: the images.
        how: they are prepared.
        encode: takes a crop ``[H, W, 3]`` (uint8); gives tensors with a leading 1.
        cache: where entries are kept.
        key_parts: see ``Filling``.

    Raises:
        UserError: an image cannot be read, or what is made of it is not finite.
    """
    for number, record in enumerate(records):
        plan = conditioning_plan(record, how, key_parts)
        missing = set(cache.missing((wanted for wanted, _ in plan), thorough=number < CHECKED_WHOLE))
        if not missing or record.conditioning is None:
            continue
        image = record.conditioning.open()
        for wanted, variant in plan:
            if wanted.key not in missing:
                continue
            entry = encode(crop(image, variant, how[record]))
            if not all(map(is_finite, entry.values())):
                raise UserError(
                    f"the autoencoder gave numbers that are not finite for the image {record.conditioning.where}"
                )
            cache.put(wanted.key, {name: tensor[0] for name, tensor in entry.items()})
