"""Files of a folder that belong to images by their names: masks, and the images that a model is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dreamlora.data.account import FolderAccount, explain_unused, links_note, unused_note
from dreamlora.data.catalog import Catalog
from dreamlora.data.entries import Entries, EntryKind
from dreamlora.data.folder import FolderPlace, Images, require_images
from dreamlora.data.sidecars import belongs
from dreamlora.errors import UserError
from dreamlora.escapes import one_line


class Companions(NamedTuple):
    """The companions of one data set.

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


def list_companions(images: Images, folder: Path, flag: str, kind: str) -> Companions | None:
    """Those of one data set; no file is opened. None: its images lie in no folder.

    Args:
        images: of the data set.
        folder: of the companions.
        flag: that names it.
        kind: what they are, such as "mask".

    Raises:
        UserError: the folder is missing, or that of the images; or a file belongs to no image, or two belong to one.
    """
    if images.entries is None:
        return None
    if folder.resolve() == images.entries.folder.resolve():
        raise UserError(f"{flag} {folder} is the folder of the images: put the {kind}s into one of their own")
    names = {record.name for record in images.records}
    files = _load(folder, sorted({Path(name).parent.as_posix() for name in names} - {"."}), flag, kind)
    row = {name: row for name, row in _rows(files, images.entries, folder, kind).items() if name in names}
    return Companions(files, row, len(names) - len(row))


def _load(folder: Path, below: Sequence[str], flag: str, kind: str) -> Images:
    """All images of a folder, and those of its sub-folders ``below``."""
    catalog = Catalog(FolderPlace(folder))
    entries = Entries(catalog.db, folder)
    with catalog.filling():
        entries.read(flag)
        for parent in below:
            entries.read_below(parent)
        for name in list(entries.names(EntryKind.BELOW)):
            entries.take_as_image(name)
        require_images(entries, flag)
        for name in entries.names(EntryKind.IMAGE):
            catalog.add(name, [""])
        for entry in (EntryKind.CAPTION, EntryKind.METADATA):
            for name in list(entries.names(entry)):
                entries.unused(name, f"captions beside {kind}s do not count")
        explain_unused(entries)
    notes = (*links_note(entries), *unused_note(entries))
    return Images(catalog, tuple(map(one_line, notes)), FolderAccount(catalog), entries)


def _rows(files: Images, images: Entries, folder: Path, kind: str) -> dict[str, int]:
    """The companion of every image that has one, by the image's name, also of images that are not used."""
    rows: dict[str, int] = {}
    stray: list[str] = []
    for row, file in enumerate(files.records):
        alike = images.like(file.name, EntryKind.IMAGE)
        named = [image for image in alike if belongs(file.name, image, images, folder)]
        if not named:
            stray.append(file.name)
        for image in named:
            other = rows.setdefault(image, row)
            if other != row:
                raise UserError(
                    f"{files.records[other].name} and {file.name} in {folder} are {kind}s of one image: keep one of "
                    "them"
                )
    if stray:
        several = len(stray) > 1
        raise UserError(
            f"{len(stray)} {kind}{'s' * several} in {folder} belong{'s' * (not several)} to no image, such as "
            f"{stray[0]}: a {kind} has the name of its image (its ending may be another)"
        )
    return rows
