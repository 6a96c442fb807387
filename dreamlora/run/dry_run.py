"""``--dry_run``: all checks of flags and data, and a table of what becomes of every entry. Nothing is written."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dreamlora.config import Data, RunConfig
from dreamlora.data.account import TRUNCATED, Entry
from dreamlora.data.companions import Companions
from dreamlora.data.dataset import copies_note, examine, list_images, split_holdout
from dreamlora.data.folder import Images, load_folder
from dreamlora.data.images import ImageRecord, holds_images
from dreamlora.data.sets import DataSets, epoch_length, joined, load_beside, with_beside
from dreamlora.escapes import one_line
from dreamlora.scratch import Scratch

HEADS = ("entry", "use", "captions from", "captions, or why it is not used")
WIDEST = 40
"""Characters of a column of names; longer ones push the rest of their line to the right."""
NARROWEST = 20


class Listed(NamedTuple):
    """One data set of a dry run.

    Attributes:
        title: what it is, with its flag.
        images: with what became of every entry.
        repeats: how often each image is seen in an epoch.
        measured: whether images of it alone are held out.
        holdout: how many, as the option says.
    """

    title: str
    images: Images
    repeats: int = 1
    measured: bool = False
    holdout: int | None = None


def dry_run(config: RunConfig) -> None:
    """Read all data as a run would, decode every image, and print what becomes of everything. Main process only.

    Args:
        config: that ``preflight.check`` has found right.

    Raises:
        UserError: the data cannot be used.
    """
    if int(os.environ.get("RANK", "0")):
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    with Scratch() as scratch:
        for listed in _data_sets(config, scratch):
            sys.stdout.writelines(f"{line}\n" for line in describe(listed, width))
    sys.stdout.write(
        "dry run: flags and data can be used, as far as that can be told without the model (dreamlora doctor asks it "
        "too); no model was loaded and nothing written\n"
    )


def _data_sets(config: RunConfig, scratch: Path) -> Iterator[Listed]:
    data = config.data
    if not data.brings_images:
        built_in = f"style {data.style}" if data.style else f"subject {data.subject}"
        sys.stdout.write(f"images of the built-in {built_in}: drawn when the run begins\n\n")
    several = []
    for one in data.each() if data.brings_images else ():
        images = _examined(list_images(_kept_in(scratch, one), config.model.cache_dir))
        source = one.dataset_name or one.train_data_dir or one.instance_data_dir
        yield Listed(f"images to learn: {source}", images, one.repeats, not data.datasets, data.holdout)
        beside = load_beside(images, one, None, progress=True)
        several.append(with_beside(images, beside, one))
        folders = (("mask", one.mask_data_dir), ("conditioning image", one.conditioning_data_dir))
        for found, (kind, folder) in zip(beside, folders, strict=True):
            if found:
                yield Listed(f"{kind}s: {folder}", found.files._replace(account=_of_images(found, kind)))
    if data.datasets:
        sys.stdout.writelines(f"{line}\n" for line in _of_all(joined(several, data), data))
    classes = data.class_data_dir
    if classes and holds_images(classes, "--class_data_dir"):
        images = _examined(load_folder(classes, data.class_prompt, flag="--class_data_dir"))
        yield Listed(f"class images: {classes}", images)


def _of_images(companions: Companions, kind: str) -> list[Entry]:
    """The account of a folder of masks or conditioning images, with the images that they belong to."""
    images: dict[str, list[str]] = defaultdict(list)
    for image, row in companions.row.items():
        images[companions.files.records[row].name].append(image)

    def told(entry: Entry) -> Entry:
        if entry.name in images:
            return Entry(entry.name, kind, "", (f"of {', '.join(images[entry.name])}",))
        if entry.use == "folder":
            return entry._replace(texts=(f"its {kind}s belong to images",))
        return Entry(entry.name, "not used", "", (f"of {TRUNCATED}",)) if entry.use == "image" else entry

    return list(map(told, companions.files.account))


def _of_all(images: DataSets, data: Data) -> Iterator[str]:
    """The totals of several data sets."""
    training, held_out = split_holdout(images.records, data.holdout)
    yield f"in all, {_split(training, held_out)}"
    yield f"samples in an epoch: {epoch_length(training, data)}"
    yield from (f"note: {note}" for note in images.shared)
    yield ""


def _split(training: Sequence[ImageRecord], held_out: Sequence[ImageRecord]) -> str:
    return f"images to learn: {len(training)}, held out: {len(held_out)}"


def _kept_in(scratch: Path, data: Data) -> Data:
    """A stream's images lie in files while they are looked at."""
    return replace(data, latents_cache_dir=scratch) if data.streaming else data


def _examined(images: Images) -> Images:
    examine(images.records, None, progress=True)
    return images._replace(notes=(*images.notes, *copies_note(images.records)))


def describe(listed: Listed, width: int | None = None) -> Iterator[str]:
    """The lines of a table of all entries, of its totals and of what else is to be said.

    Args:
        listed: the data set.
        width: of a terminal, to which captions and reasons are shortened; None: they are whole.
    """
    widths = [len(head) for head in HEADS[:3]]
    for entry in listed.images.account:
        cells = (one_line(entry.name), entry.use, one_line(entry.source))
        widths = [min(WIDEST, max(size, len(cell))) for size, cell in zip(widths, cells, strict=True)]
    yield listed.title
    yield _line(HEADS, widths, width)
    counts: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for entry in listed.images.account:
        counts[entry.use] += 1
        if entry.use == "image":
            sources[_kind_of_source(entry.source)] += 1
        for number, text in enumerate(_texts(entry)):
            first = (one_line(entry.name), entry.use, one_line(entry.source))
            yield _line((*(first if number == 0 else ("", "", "")), text), widths, width)
    yield ""
    yield from _totals(listed, counts, sources)
    yield from (f"note: {note}" for note in listed.images.notes)
    yield ""


def _totals(listed: Listed, counts: Counter[str], sources: Counter[str]) -> Iterator[str]:
    entries = ", ".join(f"{count} {use}" for use, count in counts.most_common())
    yield f"{sum(counts.values())} entries: {entries}"
    if not sources:  # masks
        return
    yield "captions: " + ", ".join(f"{count} from {source}" for source, count in sources.most_common())
    records = listed.images.records
    several = sum(len(record.captions) > 1 for record in records)
    told = _split(*split_holdout(records, listed.holdout)) if listed.measured else f"images: {len(records)}"
    told += f", with several captions, of which one is drawn each time: {several}" if several else ""
    yield f"{told}, repeats: {listed.repeats}"


def _texts(entry: Entry) -> Sequence[str]:
    texts = [one_line(text) for text in entry.texts] or [""]
    return texts if len(texts) == 1 else [f"{number}. {text}" for number, text in enumerate(texts, start=1)]


def _kind_of_source(source: str) -> str:
    """Where captions are from, without the name of each file."""
    if source.startswith(("--", "column ")):
        return source
    return source.split(",")[0] if ", line " in source else f"{Path(source.lower()).suffix} files"


def _line(cells: Sequence[str], widths: Sequence[int], width: int | None) -> str:
    begin = "".join(f"  {cell:<{size}}" for cell, size in zip(cells, widths, strict=False))
    line = f"{begin}  {cells[-1]}".rstrip()
    most = max(width or len(line), len(begin) + NARROWEST)
    return line if len(line) <= most else line[: most - 3] + "..."
