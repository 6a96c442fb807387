"""The masks of images: those of a folder, and the transparency of the images themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from dreamlora.config import Data
from dreamlora.data.catalog import Records
from dreamlora.data.companions import Companions, list_companions
from dreamlora.data.folder import Images
from dreamlora.data.images import ImageFacts, ImageRecord, alpha, decode, see_through
from dreamlora.data.rgb import Opacity
from dreamlora.errors import UserError

FLAG = "--mask_data_dir"


def list_masks(images: Images, data: Data) -> Companions | None:
    """The masks of one data set; no file is opened. None: it has no folder of them.

    Args:
        images: of the data set.
        data: its options.

    Raises:
        UserError: their folder is missing, or that of the images; or a mask belongs to no image, or two belong to one.
    """
    folder = data.mask_data_dir
    return None if folder is None else list_companions(images, folder, FLAG, "mask")


def look_at_mask(mask: ImageRecord) -> ImageFacts:
    """The facts of a mask, decoded whole.

    Raises:
        UserError: see ``grey``.
    """
    grey(mask)
    return mask.decoded_facts()


def grey(mask: ImageRecord) -> Image.Image:
    """A mask as it counts: 8-bit grey; of an image's own transparency its alpha channel.

    Raises:
        UserError: it cannot be read, is transparent in places, or black everywhere.
    """
    data = mask.load()
    if mask.of_alpha:
        return alpha(data, mask.where)
    if see_through(data, mask.where):
        raise UserError(
            f"the mask {mask.where} is transparent in places, which does not say whether these are learned: save it in "
            "black, grey and white alone (of a cut-out, its alpha channel as a picture)"
        )
    picture = decode(data, mask.where).convert("L")
    if picture.getextrema() == (0, 0):
        raise UserError(f"the mask {mask.where} is black everywhere: nothing of its image would be learned")
    return picture


class MaskedRecords(Records):
    """Images, each with its mask if there is one.

    Args:
        images: of one data set.
        masks: that have been looked at.

    Raises:
        UserError: a mask has another shape than its image.
    """

    def __init__(self, images: Sequence[ImageRecord], masks: Companions) -> None:
        self._images = images
        self._masks = masks
        for image in self:
            _require_same_shape(image)

    def __len__(self) -> int:
        return len(self._images)

    def at(self, row: int) -> ImageRecord:
        """The record of a row."""
        image = self._images[row]
        place = self._masks.row.get(image.name)
        return image if place is None else replace(image, mask=self._masks.files.records[place])


class AlphaRecords(Records):
    """Images, each with its alpha channel as its mask if it is transparent in places and has no other mask.

    Args:
        images: of one data set, that have been looked at.

    Raises:
        UserError: nothing of an image is opaque.
    """

    def __init__(self, images: Sequence[ImageRecord]) -> None:
        self._images = images
        empty = next((image for image in self if image.mask and image.facts.opacity is Opacity.NOTHING), None)
        if empty and empty.mask and empty.mask.of_alpha:
            raise UserError(
                f"{empty.where} is transparent everywhere: with --alpha_mask nothing of it would be learned. Take it "
                "out, or leave --alpha_mask out"
            )

    def __len__(self) -> int:
        return len(self._images)

    def at(self, row: int) -> ImageRecord:
        """The record of a row."""
        image = self._images[row]
        if image.mask or image.facts.opacity is Opacity.ALL:
            return image
        digest = hashlib.sha256(f"alpha of {image.content_hash()}".encode()).hexdigest()
        facts = ImageFacts(digest, image.facts.size)
        return replace(image, mask=replace(image, known=facts, of_alpha=True))


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
