"""The images before an edit, and the images that they belong to: those after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dreamlora.config import Data
from dreamlora.data.catalog import Records
from dreamlora.data.companions import Companions, list_companions
from dreamlora.data.folder import Images
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError

FLAG = "--conditioning_data_dir"


def list_conditioning(images: Images, data: Data) -> Companions | None:
    """The conditioning images of one data set; no file is opened. None: it has no folder of them.

    Raises:
        UserError: see ``list_companions``; or an image has none.
    """
    folder = data.conditioning_data_dir
    if folder is None:
        return None
    found = list_companions(images, folder, FLAG, "conditioning image")
    if found and found.without:
        lacking = next(record.name for record in images.records if record.name not in found.row)
        raise UserError(
            f"{found.without} of {len(images.records)} images have no conditioning image in {FLAG} {folder}, such as "
            f"{lacking}: each needs the image before the edit, with the same name (its ending may be another)"
        )
    return found


class ConditionedRecords(Records):
    """Images, each with its conditioning image.

    Args:
        images: of one data set.
        conditioning: that have been looked at.
    """

    def __init__(self, images: Sequence[ImageRecord], conditioning: Companions) -> None:
        self._images = images
        self._conditioning = conditioning

    def __len__(self) -> int:
        return len(self._images)

    def at(self, row: int) -> ImageRecord:
        """The record of a row."""
        image = self._images[row]
        return replace(image, conditioning=self._conditioning.files.records[self._conditioning.row[image.name]])
