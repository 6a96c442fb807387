"""Caption files beside images: ``photo.txt``, ``photo.caption`` or ``photo.json`` for ``photo.jpg``.

A file may carry the image's ending too (``photo.jpg.txt``), and may differ from the image in case where no other image
could be meant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dreamlora.data.caption_text import captions_of, listed, pick_caption_column, text_of, tidy, unique
from dreamlora.data.entries import CAPTION_SUFFIXES, Entries, EntryKind, folded, spelled
from dreamlora.errors import UserError
from dreamlora.reading import json_of


class Sidecar(NamedTuple):
    """One caption file of an image.

    Attributes:
        name: of the file.
        captions: none if it is empty.
        lines: how many it has that are not blank, where line breaks became spaces; else 1.
    """

    name: str
    captions: tuple[str, ...]
    lines: int = 1


class SidecarReader:
    """Finds and reads the caption files of images.

    Args:
        entries: of the folder.
        caption_column: key of the captions in .json files, instead of ``text`` or ``caption``.
        per_line: every line of a text file is a caption.
        strict: whether .json files must hold captions; else those that do not have none.
    """

    def __init__(
        self, entries: Entries, caption_column: str | None = None, per_line: bool = False, strict: bool = True
    ) -> None:
        self._entries = entries
        self._column = caption_column
        self._per_line = per_line
        self._strict = strict

    def of(self, image: str) -> list[Sidecar]:
        """The caption files of an image, in their order of precedence.

        Raises:
            UserError: one cannot be read, or could belong to another image as well.
        """
        captions = self._entries.like(image, EntryKind.CAPTION)
        files = [name for name in captions if belongs(name, image, self._entries, self._entries.folder)]
        files.sort(key=lambda name: CAPTION_SUFFIXES.index(Path(name).suffix.lower()))
        return [self._read(name) for name in files]

    def _read(self, name: str) -> Sidecar:
        file = self._entries.folder / name
        if file.suffix.lower() == ".json":
            try:
                return Sidecar(name, self._json(file))
            except UserError:
                if self._strict:
                    raise
                return Sidecar(name, ())
        lines = [line for line in map(tidy, text_of(file).splitlines()) if line]
        if self._per_line:
            return Sidecar(name, captions_of(lines, str(file)))
        return Sidecar(name, captions_of(" ".join(lines), str(file)), max(1, len(lines)))

    def _json(self, file: Path) -> tuple[str, ...]:
        try:
            content = json_of(text_of(file), functools.partial(unique, where=str(file)))
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error}): mend it, or move it elsewhere") from None
        if not isinstance(content, dict):
            return captions_of(content, str(file))
        key = pick_caption_column(list(content), self._column, str(file))
        if key is None:
            keys = listed(content) or "nothing"
            raise UserError(
                f"{file} has no text or caption: it has {keys}. Say which one is the caption with --caption_column, or "
                "move the file elsewhere"
            )
        return captions_of(content[key], str(file))


def belongs(name: str, image: str, entries: Entries, folder: Path) -> bool:
    """Whether a file is named after this image: by its exact name, or by another case if no image has that.

    Args:
        name: of the file.
        image: of the folder.
        entries: of the folder.
        folder: where the file lies, for the error message.

    Raises:
        UserError: it could belong to another image as well.
    """
    base = _without_ending(name)
    if _names(image, base, spelled):
        return True
    if not _names(image, base, folded):
        return False
    others = [other for other in entries.like(name, EntryKind.IMAGE) if _names(other, base, folded)]
    if any(_names(other, base, spelled) for other in others):
        return False
    if len({spelled(_without_ending(other)) for other in others}) > 1:
        raise UserError(f"{folder / name} differs in case from {' and '.join(others)}: name it as its image")
    return True


def _names(image: str, base: str, alike: Callable[[str], str]) -> bool:
    return alike(base) in (alike(image), alike(_without_ending(image)))


def _without_ending(name: str) -> str:
    return name.removesuffix(Path(name).suffix)
