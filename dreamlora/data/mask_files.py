"""The masks of a folder, and the images that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

from dreamlora.data.catalog import RecordSubset
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError


class MaskedRecords(Sequence[ImageRecord]):
    """Images, each with the mask that has its name (whatever the ending) if there is one.

    Args:
        images: of one data set.
        masks: of their folder.
        place: that folder, for error messages.

    Raises:
        UserError: a mask belongs to no image or has another shape, two belong to one, or no image has one.
    """

    def __init__(self, images: Sequence[ImageRecord], masks: Sequence[ImageRecord], place: Path) -> None:
        self._images = images
        self._masks = masks
        self._row = _rows_by_stem(masks, place)
        self.without = sum(_stem(image.name) not in self._row for image in images)
        unused = self._row.keys() - {_stem(image.name) for image in images}
        if unused:
            first = masks[min(self._row[stem] for stem in unused)].name
            raise UserError(
                f"{len(unused)} masks in {place} belong to no image, such as {first}: a mask has the name of its image "
                "(its ending may be another)"
            )
        for image in self:
            _require_same_shape(image)

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, row: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[ImageRecord]: ...
    def __getitem__(self, row: int | slice) -> ImageRecord | Sequence[ImageRecord]:
        if isinstance(row, slice):
            return RecordSubset(self, range(len(self))[row])
        image = self._images[row]
        place = self._row.get(_stem(image.name))
        return image if place is None else replace(image, mask=self._masks[place])

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self[row] for row in range(len(self)))


def _rows_by_stem(masks: Sequence[ImageRecord], place: Path) -> Mapping[str, int]:
    rows: dict[str, int] = {}
    for row, mask in enumerate(masks):
        other = rows.setdefault(_stem(mask.name), row)
        if other != row:
            raise UserError(f"{masks[other].name} and {mask.name} in {place} are masks of one image: keep one of them")
    return rows


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _require_same_shape(image: ImageRecord) -> None:
    if image.mask is None:
        return
    width, height = image.facts.size
    across, down = image.mask.facts.size
    if abs(across * height - down * width) > max(width, height, across, down):  # off by more than a rounded pixel
        raise UserError(
            f"the mask {image.mask.where} has another shape ({across} x {down}) than its image {image.where} "
            f"({width} x {height})"
        )
