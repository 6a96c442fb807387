"""What is trained on and what is held out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dreamlora.cache_folder import cache_folder
from dreamlora.config import Data
from dreamlora.data.catalog import Catalog, RecordSubset, hash_prefixes
from dreamlora.data.file_index import FileIndex
from dreamlora.data.folder import Images, load_folder
from dreamlora.data.hub import load_hub
from dreamlora.data.images import ImageFacts, ImageRecord
from dreamlora.errors import UserError
from dreamlora.pictures import BrokenImage

FEWEST_TO_SPLIT = 6
MOST_HELD_OUT = 16
MOST_THREADS = 8
"""That decode images. More would seldom be faster, and each holds a decoded image."""
MOST_NAMED = 10
"""Broken images that are told by name."""


def load_images(data: Data, cache_dir: Path | None = None, progress: bool = False) -> Images:
    """The images that ``data`` names, each decoded once (see ``examine``), so that broken ones are found before a model
    is loaded.

    Args:
        data: the options.
        cache_dir: where downloads of ``datasets`` are kept.
        progress: show a bar.

    Raises:
        UserError: see ``list_images``; or images are broken.
    """
    images = list_images(data, cache_dir, progress)
    examine(images.records, cache_folder(data.latents_cache_dir), progress)
    return images._replace(notes=(*images.notes, *copies_note(images.records)))


def list_images(data: Data, cache_dir: Path | None = None, progress: bool = False) -> Images:
    """The images that ``data`` names, from a folder or from Hugging Face ``datasets``, with their captions; no image is
    opened.

    Of ``data``'s options ``max_train_samples`` is applied; ``repeats`` is not: it changes the length of an epoch, not
    the images.

    Args:
        data: the options.
        cache_dir: where downloads of ``datasets`` are kept.
        progress: show a bar.

    Raises:
        UserError: see ``load_folder`` and ``load_hub``.
    """
    if data.dataset_name:
        images = load_hub(data, cache_dir, progress)
    elif folder := data.train_data_dir or data.instance_data_dir:
        flag = "--train_data_dir" if data.train_data_dir else "--instance_data_dir"
        prompt = None if data.train_data_dir else data.instance_prompt
        images = load_folder(folder, prompt, data.caption_column, flag, captions_per_line=data.captions_per_line)
    else:
        raise UserError("nothing to train on: give a folder of images or --dataset_name")
    if data.max_train_samples is not None:
        images.records.truncate(data.max_train_samples)
    return images


def copies_note(records: Catalog) -> list[str]:
    """What is to be said of images that are there several times, byte for byte."""
    copies = records.copies()
    if not copies:
        return []
    return [f"{copies} of {len(records)} images {'is a copy' if copies == 1 else 'are copies'} of another one"]


def examine(
    records: Catalog,
    cache: Path | None,
    progress: bool = False,
    rows: Sequence[int] | None = None,
    look: Callable[[ImageRecord], ImageFacts] = lambda record: record.decoded_facts(),
) -> None:
    """Decode every image once, so that a broken one is found before a model is loaded, and keep hash and size.

    Threads decode (Pillow lets them run at the same time); as many images are in memory as there are threads. Files
    that were decoded before and have not changed since are not read.

    Args:
        records: get what was found out.
        cache: folder of the index of known files; None: nothing is looked up or written.
        progress: show a bar.
        rows: to look at; by default all.
        look: decodes an image; raises a UserError for one that cannot be used.

    Raises:
        BrokenImage: an image is broken or cannot be read.
        UserError: several are; the message names up to 10 of them, each with its reason. Or see ``look``.
    """
    index = FileIndex(cache)
    asked = range(len(records)) if rows is None else rows
    bar = tqdm(asked, "reading images", unit="image", delay=3, leave=False, disable=not progress)
    broken: list[BrokenImage] = []
    with records.filling(), ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
        for job, decoded in _ahead(pool, _unknown(records, bar, index), look):
            try:
                facts = decoded.result()
            except BrokenImage as error:
                broken.append(error)
                continue
            if job.stamp and job.stamp == records.place.stamp(job.row, job.record.name):  # else it changed meanwhile
                index.put(*job.stamp, facts)
            records.examined(job.row, facts)
    index.close()
    if broken:
        raise _told_together(broken, len(asked))


class _Undecoded(NamedTuple):
    """An image to decode, and its stamp before that."""

    row: int
    record: ImageRecord
    stamp: tuple[str, str] | None


def _unknown(records: Catalog, rows: Iterable[int], index: FileIndex) -> Iterator[_Undecoded]:
    """The rows whose image must be decoded; of the others what is known is kept."""
    for row in rows:
        record = records[row]
        stamp = records.place.stamp(row, record.name)
        facts = record.known or (index.get(*stamp) if stamp else None)
        if facts is None:
            yield _Undecoded(row, record, stamp)
        else:
            records.examined(row, facts)


def _ahead(
    pool: ThreadPoolExecutor, jobs: Iterable[_Undecoded], look: Callable[[ImageRecord], ImageFacts]
) -> Iterator[tuple[_Undecoded, Future[ImageFacts]]]:
    """Every job with its result to come, in order; a few are begun before they are asked for."""
    begun: deque[tuple[_Undecoded, Future[ImageFacts]]] = deque()
    for job in jobs:
        begun.append((job, pool.submit(look, job.record)))
        if len(begun) > 2 * MOST_THREADS:
            yield begun.popleft()
    yield from begun


def _told_together(broken: Sequence[BrokenImage], count: int) -> UserError:
    if len(broken) == 1:
        return broken[0]
    lines = [f"  {error.where}: {error.reason}" for error in broken[:MOST_NAMED]]
    if len(broken) > MOST_NAMED:
        lines.append(f"  and {len(broken) - MOST_NAMED} more")
    remedy = "Repair them, save them anew or take them out"
    return UserError("\n".join([f"{len(broken)} of {count} images cannot be read:", *lines, remedy]))


def split_holdout(
    records: Sequence[ImageRecord], holdout: int | None
) -> tuple[Sequence[ImageRecord], Sequence[ImageRecord]]:
    """``(train, held_out)``, both in the order of ``records``.

    The images with the smallest hashes are held out. So the choice depends on what the images show, not on their names
    or order; adding one image changes it by at most one or two; and copies of an image never lie on both sides (they
    count as one, so ``held_out`` may be longer than the number asked for).

    Args:
        records: all images.
        holdout: how many different images to hold out; None: a fifth of them, at most 16, none of fewer than 6.

    Raises:
        UserError: ``holdout`` leaves nothing to train on.
    """
    # The first 64 bits of a hash are enough here: two images that share it would be kept on one side, no more.
    prefixes = hash_prefixes(records)
    different = np.unique(prefixes)
    if holdout is None:
        holdout = min(MOST_HELD_OUT, len(different) // 5) if len(different) >= FEWEST_TO_SPLIT else 0
    if holdout and holdout >= len(different):
        raise UserError(f"--holdout {holdout} leaves nothing to train on: there are {len(different)} different images")
    chosen = np.isin(prefixes, different[:holdout])
    return RecordSubset(records, np.flatnonzero(~chosen)), RecordSubset(records, np.flatnonzero(chosen))
