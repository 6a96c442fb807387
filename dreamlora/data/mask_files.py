"""The masks of images: those of a folder, and the transparency of the images themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dreamlora.config import Data
from dreamlora.data.account import FolderAccount, explain_unused, links_note, unused_note
from dreamlora.data.catalog import Catalog, Records
from dreamlora.data.entries import Entries, EntryKind
from dreamlora.data.folder import FolderPlace, Images, require_images
from dreamlora.data.images import ImageFacts, ImageRecord, Opacity, alpha, decode, see_through
from dreamlora.data.sidecars import belongs
from dreamlora.errors import UserError
from dreamlora.escapes import one_line

FLAG = "--mask_data_dir"


class Masks(NamedTuple):
    """The masks of one data set.

    Attributes:
        files: all of the folder.
        row: that of every image which has one, by the image's name.
        without: images that have none.
    """

    files: Images
    row: Mapping[str, int]
    without: int

    @property
    def rows(self) -> list[int]:
        """All that count, in the order of the folder."""
        return sorted(set(self.row.values()))


def list_masks(images: Images, data: Data) -> Masks | None:
    """The masks of one data set; no file is opened. None: it has no folder of them.

    Args:
        images: of the data set.
        data: its options.

    Raises:
        UserError: their folder is missing, or that of the images; or a mask belongs to no image, or two belong to one.
    """
    folder = data.mask_data_dir
    if folder is None or images.entries is None:
        return None
    if folder.resolve() == images.entries.folder.resolve():
        raise UserError(f"{FLAG} {folder} is the folder of the images: put the masks into one of their own")
    names = {record.name for record in images.records}
    files = _load_masks(folder, sorted({Path(name).parent.as_posix() for name in names} - {"."}))
    row = {name: mask for name, mask in _masks_of_images(files, images.entries, folder).items() if name in names}
    return Masks(files, row, len(names) - len(row))


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

    def __init__(self, images: Sequence[ImageRecord], masks: Masks) -> None:
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


def _load_masks(folder: Path, below: Sequence[str]) -> Images:
    """All images of a folder of masks, and those of its sub-folders ``below``."""
    catalog = Catalog(FolderPlace(folder))
    entries = Entries(catalog.db, folder)
    with catalog.filling():
        entries.read(FLAG)
        for parent in below:
            entries.read_below(parent)
        for name in list(entries.names(EntryKind.BELOW)):
            entries.take_as_image(name)
        require_images(entries, FLAG)
        for name in entries.names(EntryKind.IMAGE):
            catalog.add(name, [""])
        for kind in (EntryKind.CAPTION, EntryKind.METADATA):
            for name in list(entries.names(kind)):
                entries.unused(name, "captions beside masks do not count")
        explain_unused(entries)
    notes = (*links_note(entries), *unused_note(entries))
    return Images(catalog, tuple(map(one_line, notes)), FolderAccount(catalog), entries)


def _masks_of_images(files: Images, images: Entries, folder: Path) -> dict[str, int]:
    """The mask of every image that has one, by the image's name, also of images that are not used."""
    rows: dict[str, int] = {}
    stray: list[str] = []
    for row, mask in enumerate(files.records):
        alike = images.like(mask.name, EntryKind.IMAGE)
        named = [image for image in alike if belongs(mask.name, image, images, folder)]
        if not named:
            stray.append(mask.name)
        for image in named:
            other = rows.setdefault(image, row)
            if other != row:
                raise UserError(
                    f"{files.records[other].name} and {mask.name} in {folder} are masks of one image: keep one of them"
                )
    if stray:
        several = len(stray) > 1
        raise UserError(
            f"{len(stray)} mask{'s' * several} in {folder} belong{'s' * (not several)} to no image, such as "
            f"{stray[0]}: a mask has the name of its image (its ending may be another)"
        )
    return rows


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
