"""A folder of images with captions beside them.

Images are taken in natural order of their names (img2 before img10). Sub-folders are not descended; only images that a
metadata file names may lie in one. The captions of an image come from the first of these that has any:

1. ``name.txt``, ``name.caption`` or ``name.json`` beside ``name.jpg``, see ``sidecars``,
2. its row in ``metadata.jsonl`` or ``metadata.csv``, see ``metadata``,
3. the prompt for all.

Two that say different things stop the run: one of them would not count. What becomes of every entry is written down,
see ``account``.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dreamlora.data.account import (
    NO_ROLE,
    NO_SUCH_IMAGE,
    Entry,
    FolderAccount,
    explain_unused,
    folder_name_note,
    kohya_meaning,
    links_note,
    unused_note,
)
from dreamlora.data.caption_text import listed, tidy
from dreamlora.data.catalog import Catalog
from dreamlora.data.entries import KOHYA_FOLDER, Entries, EntryKind, images_below, may_hold_captions, shown
from dreamlora.data.file_index import stamp_of
from dreamlora.data.images import FORMATS, file_reader, readable
from dreamlora.data.metadata import Metadata, read_metadata
from dreamlora.data.sidecars import Sidecar, SidecarReader
from dreamlora.errors import UserError
from dreamlora.escapes import one_line


class Images(NamedTuple):
    """The images of a data set.

    Attributes:
        records: the images.
        notes: what the person should know of them, a sentence each.
        account: what became of every entry.
        entries: of a folder.
    """

    records: Catalog
    notes: tuple[str, ...] = ()
    account: Iterable[Entry] = ()
    entries: Entries | None = None


@dataclass(frozen=True)
class FolderPlace:
    """Image files by their names in a folder; a ``catalog.Place``."""

    folder: Path

    def reader(self, row: int, name: str) -> Callable[[], bytes]:
        """Reads the file."""
        return file_reader(self.folder / name)

    def where(self, row: int, name: str) -> str:
        """The file's path."""
        return str(self.folder / name)

    def stamp(self, row: int, name: str) -> tuple[str, str] | None:
        """Absolute path, and the file's size and times."""
        file = self.folder / name
        stamp = stamp_of(file)
        return (str(file.absolute()), stamp) if stamp else None


def load_folder(
    folder: Path,
    prompt: str | None = None,
    caption_column: str | None = None,
    flag: str = "--instance_data_dir",
    *,
    captions_per_line: bool = False,
    strict: bool = True,
) -> Images:
    """The images of ``folder`` with their captions; no image is opened yet.

    Args:
        folder: where the images lie.
        prompt: caption of images without one.
        caption_column: column of the metadata file and key of .json captions, instead of ``text`` or ``caption``.
        flag: option that names the folder, for error messages.
        captions_per_line: every line of a text file is a caption of its own; else line breaks become spaces.
        strict: whether captions that would not count, and one file under two names, stop the run. Not where the images
            are only compared with.

    Raises:
        UserError: no folder or no image there, an image without caption, captions or metadata that do not fit the
            folder, an image format that cannot be read.
    """
    catalog = Catalog(FolderPlace(folder))
    entries = Entries(catalog.db, folder)
    with catalog.filling():
        entries.read(flag)
        metadata = read_metadata(entries, caption_column)
        require_images(entries, flag)
        sidecars = SidecarReader(entries, caption_column, captions_per_line, strict)
        captions = _Captions(entries, sidecars, tidy(prompt), flag)
        captions.add_to(catalog)
        explain_unused(entries)
        if strict:
            _refuse_same_file(entries)
            _refuse_uncounted(captions, metadata)
            _refuse_stray(captions)
        captions.refuse_missing(len(catalog))
        if caption_column and not metadata.file and not captions.from_json:
            raise UserError(
                f"--caption_column {caption_column}: {folder} has no metadata.jsonl, metadata.csv or .json captions: "
                "leave the flag out"
            )
        notes = (*folder_name_note(folder), *captions.notes(), *links_note(entries), *unused_note(entries))
    return Images(catalog, tuple(map(one_line, notes)), FolderAccount(catalog), entries)


@dataclass
class _Named:
    """Files with something in common: how many, and the first names."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < 4:
            self.first.append(name)

    def __str__(self) -> str:
        return shown(self.first, self.count)


class _Captions:
    """Gives every image its captions, and keeps what is to be said of them.

    Attributes:
        from_json: whether a .json file gave any.
        own, by_prompt, missing: images with captions of their own, with the prompt for all, and with neither.
        conflict: first two sources of one image that say different things, as a sentence.
    """

    def __init__(self, entries: Entries, sidecars: SidecarReader, prompt: str, flag: str) -> None:
        self.entries = entries
        self.prompt = prompt
        self.from_json = False
        self.conflict = ""
        self.own = _Named()
        self.by_prompt = _Named()
        self.missing = _Named()
        self._sidecars = sidecars
        self._flag = flag
        self._several_lines, self._shared, self._empty = _Named(), _Named(), 0

    def add_to(self, catalog: Catalog) -> None:
        """Every image, in natural order, as a row of the catalogue."""
        metadata = next(self.entries.names(EntryKind.METADATA), "")
        query = "SELECT name, captions, line FROM entries WHERE kind = ? ORDER BY sort"
        for encoded, cell, line in self.entries.db.execute(query, (EntryKind.IMAGE,)):  # sorted before the first comes
            name = os.fsdecode(encoded)
            row = Sidecar(f"{metadata}, line {line}" if line else "", tuple((cell or "").split("\n")) if cell else ())
            captions, source = self._of(name, self._sidecars.of(name), row)
            catalog.add(name, captions, source)

    def _of(self, image: str, sidecars: list[Sidecar], row: Sidecar) -> tuple[tuple[str, ...], str]:
        """An image's captions and where they are from."""
        given = next((one for one in (*sidecars, row) if one.captions), None)
        for one in sidecars:
            self._settle(image, one, given)
        if given is None:
            self._empty += bool(sidecars or row.name)
            (self.by_prompt if self.prompt else self.missing).add(image)
            prompt_flag = "--class_prompt" if self._flag == "--class_data_dir" else "--instance_prompt"
            return (self.prompt,), prompt_flag
        self.own.add(image)
        for one in (*sidecars, row):
            if one.captions and one.captions != given.captions and not self.conflict:
                self.conflict = f"{self.entries.folder / image} has two captions: {_quoted(given)} and {_quoted(one)}"
        return given.captions, given.name

    def _settle(self, image: str, one: Sidecar, given: Sidecar | None) -> None:
        """Write down what becomes of a caption file."""
        if not one.captions:
            self.entries.unused(one.name, "an empty caption file")
        elif given is not None and one is not given:
            self.entries.unused(one.name, f"{given.name} is the caption of {image}")
        else:
            before = self.entries.use_of(one.name)
            if before:
                self._shared.add(f"{one.name} ({before.removeprefix('of ')}, {image})")
            self.entries.used(one.name, image if before else f"of {image}")
            self.from_json |= one.name.lower().endswith(".json")
            if one.lines > 1:
                self._several_lines.add(one.name)

    def refuse_missing(self, count: int) -> None:
        """Raises UserError if an image has no caption at all."""
        if self.missing.count:
            bare = self.missing.first[0]
            otherwise = "" if self._flag == "--train_data_dir" else ", or give --instance_prompt for all that have none"
            raise UserError(
                f"{self.entries.folder / bare} has no caption, or an empty one ({self.missing.count} of {count} "
                f"images): write it to {Path(bare).with_suffix('.txt')} beside it{otherwise}"
            )

    def notes(self) -> Iterator[str]:
        """What is to be said of the captions."""
        place = self.entries.folder
        if self.by_prompt.count and (self.own.count or self._empty):
            yield (
                f"{self.by_prompt.count} of {self.own.count + self.by_prompt.count} images in {place} have no caption "
                f'of their own and get the prompt "{self.prompt}": {self.by_prompt}'
            )
        if self._several_lines.count:
            yield (
                f"{_files(self._several_lines)} in {place} {_have(self._several_lines)} several lines, read as one "
                f"caption: {self._several_lines}. With --captions_per_line each line is one"
            )
        if self._shared.count:
            yield f"{_files(self._shared)} in {place} {_are(self._shared)} used for several images: {self._shared}"


def _quoted(given: Sidecar) -> str:
    first = given.captions[0]
    text = first if len(first) <= 60 else first[:57] + "..."
    more = f" and {len(given.captions) - 1} more" if len(given.captions) > 1 else ""
    return f'"{text}"{more} ({given.name})'


def _files(named: _Named) -> str:
    return f"{named.count} caption file{'s' * (named.count > 1)}"


def _are(named: _Named) -> str:
    return "is" if named.count == 1 else "are"


def _have(named: _Named) -> str:
    return "has" if named.count == 1 else "have"


def _no_images(folder: Path, flag: str) -> str:
    below = images_below(folder)
    if not below:
        kinds = sorted({kind for kind in FORMATS.values() if kind})
        return f"{flag} {folder} holds no images (looked for {', '.join(kinds)})"
    told = f"{flag} {folder} holds images only in sub-folders, which are not searched: give "
    if len(below) > 1:
        told += "one of these, or each as a data set of its own: "
    told += shown(below, len(below), most=5)
    conventions = (KOHYA_FOLDER.fullmatch(Path(place).name) for place in below)
    meant = next((kohya_meaning(found[1], found[2]) for found in conventions if found), "")
    return told + (f"; {meant}" if meant else "")


def require_images(entries: Entries, flag: str) -> None:
    """Nothing, if there are images and all can be read: photos left out silently would be worse than a stop.

    Args:
        entries: of a folder.
        flag: that names it, for error messages.

    Raises:
        UserError: there are none, or some cannot.
    """
    if next(entries.names(EntryKind.IMAGE), None) is None:
        raise UserError(_no_images(entries.folder, flag))
    unreadable = _Named()
    for name in entries.names(EntryKind.IMAGE):
        if not readable(Path(name)):
            unreadable.add(name)
    if unreadable.count:
        first, more = unreadable.first[0], "s" * (unreadable.count > 1)
        heif = FORMATS[Path(first).suffix.lower()] == "HEIF"
        plug_in = 'pip install "dreamlora[heif]" for HEIC, or ' if heif else ""
        raise UserError(
            f"the installed Pillow cannot read {first} ({unreadable.count} such file{more}): {plug_in}convert them to "
            "JPEG or PNG, or move them elsewhere"
        )


def _refuse_same_file(entries: Entries) -> None:
    """One photo under two names would be learned twice as often, and could be held out and learned at once."""
    for first, second in entries.same_files(EntryKind.IMAGE):
        # there are file systems whose numbers of files mean nothing
        if filecmp.cmp(entries.folder / first, entries.folder / second, shallow=False):
            raise UserError(
                f"{entries.folder / first} and {second} are one file (a link): keep one of the names. An image that "
                "should be seen more often belongs into a data set with --repeats"
            )


def _refuse_uncounted(captions: _Captions, metadata: Metadata) -> None:
    """Captions that would not count."""
    if captions.conflict:
        raise UserError(
            f"{captions.conflict}. Keep one of them; several captions of an image belong into a list in metadata.jsonl"
        )
    if metadata.other_texts:
        raise UserError(
            f"{metadata.file} has no column text or caption: it has {listed(('file_name', *metadata.other_texts))}. "
            "Say which one has the captions with --caption_column"
        )


def _refuse_stray(captions: _Captions) -> None:
    """Files that seem to hold captions and belong to no image, while images have none of their own."""
    without = captions.missing if captions.missing.count else captions.by_prompt
    stray = _Named()
    for kind, reason in ((EntryKind.CAPTION, NO_SUCH_IMAGE), (EntryKind.OTHER, NO_ROLE)):
        for name in filter(may_hold_captions, captions.entries.unused_as(kind, reason)):
            stray.add(name)
    if stray.count and without.count:
        raise UserError(
            f"{captions.entries.folder / stray.first[0]} seems to hold captions, but belongs to no image "
            f"({stray.count} such file{'s' * (stray.count > 1)}), while {without.count} images have none of "
            f"their own, {without.first[0]} among them. Name it as its image, such as "
            f"{Path(without.first[0]).with_suffix('.txt')}, or as metadata.jsonl or metadata.csv, or move it elsewhere"
        )
