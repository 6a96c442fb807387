"""What is trained on and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dreamlora.config import Data
from dreamlora.data.cache_folder import cache_folder
from dreamlora.data.catalog import Catalog, RecordSubset, hash_prefixes
from dreamlora.data.file_index import FileIndex
from dreamlora.data.folder import Images, load_folder
from dreamlora.data.hub import load_hub
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError

FEWEST_TO_SPLIT = 6
MOST_HELD_OUT = 16


def load_images(data: Data, cache_dir: Path | None = None, progress: bool = False) -> Images:
    """The images that ``data`` names, each looked at (see ``examine``), so that one that is no image is found before a
    model is loaded.

    Args:
        data: the options.
        cache_dir: where downloads of ``datasets`` are kept.
        progress: show a bar.

    Raises:
        UserError: see ``list_images``; or a file is no image.
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


def examine(records: Catalog, cache: Path | None, progress: bool = False) -> None:
    """Find out hash and size of every image; files that were read before and have not changed since are not read.

    Args:
        records: get what was found out.
        cache: folder of the index of known files; None: every file is read, and nothing written.
        progress: show a bar.

    Raises:
        UserError: a file is no image.
    """
    index = FileIndex(cache) if cache else None
    rows = tqdm(range(len(records)), "reading images", unit="image", delay=3, leave=False, disable=not progress)
    with records.filling():
        for row in rows:
            record = records[row]
            stamp = records.place.stamp(row, record.name) if index else None
            facts = record.known or (index.get(*stamp) if index and stamp else None)
            if facts is None:
                facts = record.facts
                if (
                    index and stamp and stamp == records.place.stamp(row, record.name)
                ):  # else it changed while it was read
                    index.put(*stamp, facts)
            records.examined(row, facts)
    if index:
        index.close()


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
