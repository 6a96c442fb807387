"""The data sets of a run as one: their images in a row, and what differs from one to the other."""

from __future__ import annotations

import bisect
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dreamlora.cache_folder import cache_folder
from dreamlora.config import Data
from dreamlora.data.catalog import Records, hash_prefixes
from dreamlora.data.companions import Companions
from dreamlora.data.conditioning_files import ConditionedRecords, list_conditioning
from dreamlora.data.dataset import examine, load_images
from dreamlora.data.folder import Images
from dreamlora.data.images import ImageRecord
from dreamlora.data.mask_files import AlphaRecords, MaskedRecords, list_masks, look_at_mask


class DataSets(NamedTuple):
    """All images of a run.

    Attributes:
        records: the images, data set by data set.
        notes: what the person should know of them, a sentence each.
        shared: the same of images that are in several data sets.
    """

    records: Sequence[ImageRecord]
    notes: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


class JoinedRecords(Records):
    """The images of several data sets, one set after the other; each carries the number of its set.

    Args:
        sets: images by data set.
        names: of the sets: before the names of their images.
    """

    def __init__(self, sets: Sequence[Sequence[ImageRecord]], names: Sequence[str]) -> None:
        self._sets = sets
        self._names = names
        self._starts = list(itertools.accumulate(map(len, sets), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, row: int) -> ImageRecord:
        """The record of a row."""
        number = bisect.bisect_right(self._starts, row) - 1
        record = self._sets[number][row - self._starts[number]]
        return replace(record, name=f"{self._names[number]}/{record.name}", dataset=number)


def load_sets(data: Data, cache_dir: Path | None = None, progress: bool = False) -> DataSets:
    """The images of all data sets that ``data`` names, with their masks and conditioning images; see
    ``load_images``.

    Raises:
        UserError: as ``load_images``; where there are several, the message says which data set is meant.
    """
    several = [_load(one, cache_dir, progress) for one in data.each()]
    return joined(several, data)


def joined(several: Sequence[DataSets], data: Data) -> DataSets:
    """The images of all data sets in a row; those of a single one as they are."""
    if not data.datasets:
        return several[0]
    names = _different([entry.name for entry in data.datasets])
    notes = tuple(dict.fromkeys(note for images in several for note in images.notes))
    shared = tuple(_shared_note([hash_prefixes(images.records) for images in several]))
    return DataSets(JoinedRecords([images.records for images in several], names), notes + shared, shared)


def _shared_note(hashes: Sequence[np.ndarray]) -> Iterator[str]:
    """What is to be said of images that are in several data sets."""
    different = [np.unique(one) for one in hashes]
    _, counts = np.unique(np.concatenate(different), return_counts=True)
    shared = int((counts > 1).sum())
    if shared:
        yield f"{shared} of {len(counts)} different images {'is' if shared == 1 else 'are'} in more than one data set"


def places(records: Sequence[ImageRecord], data: Data) -> Sequence[int] | None:
    """The image at every place of an epoch, before it is shuffled: as often as its data set's ``repeats`` says.

    What all repeats have in common only makes epochs longer, and is left out. None: every image once.
    """
    repeats = [one.repeats for one in data.each()]
    common = math.gcd(*repeats)
    if all(number == common for number in repeats):
        return None
    return array("q", (i for i, record in enumerate(records) for _ in range(repeats[record.dataset] // common)))


def epoch_length(records: Sequence[ImageRecord], data: Data) -> int:
    """Samples in an epoch: every image as often as its data set's ``repeats`` says."""
    repeats = [one.repeats for one in data.each()]
    return sum(repeats[record.dataset] for record in records)


def loss_shares(records: Sequence[ImageRecord], data: Data) -> Sequence[float] | None:
    """Factor of every image's loss; None if it is 1 for all."""
    weights = data.loss_weights
    if set(weights) == {1.0}:
        return None
    return array("d", (weights[record.dataset] for record in records))


class Beside(NamedTuple):
    """What lies in other folders for the images of one data set; None where it has no such folder."""

    masks: Companions | None
    conditioning: Companions | None


def load_beside(images: Images, data: Data, cache: Path | None, progress: bool = False) -> Beside:
    """The masks and conditioning images of one data set, those that count decoded once.

    Args:
        images: of the data set.
        data: its options.
        cache: see ``examine``.
        progress: show a bar.

    Raises:
        UserError: see ``list_masks``, ``look_at_mask`` and ``list_conditioning``.
    """
    masks, conditioning = list_masks(images, data), list_conditioning(images, data)
    if masks:
        examine(masks.files.records, cache, progress, masks.rows, look_at_mask)
    if conditioning:
        examine(conditioning.files.records, cache, progress, conditioning.rows)
    return Beside(masks, conditioning)


def with_beside(images: Images, beside: Beside, data: Data) -> DataSets:
    """One data set whose images, and what belongs to them, have been looked at.

    Raises:
        UserError: see ``MaskedRecords`` and ``AlphaRecords``.
    """
    records: Sequence[ImageRecord] = images.records
    notes, places = list(images.notes), []
    masks, conditioning = beside
    if conditioning:
        notes += conditioning.files.notes
        records = ConditionedRecords(records, conditioning)
    if masks:
        notes += masks.files.notes
        records = MaskedRecords(records, masks)
        places.append(f"a mask in {data.mask_data_dir}")
    if data.alpha_mask:
        records = AlphaRecords(records)
        places.append("transparency")
    without = sum(record.mask is None for record in records) if places else 0
    if without:
        notes.append(f"images without {' or '.join(places)}, which are learned everywhere: {without} of {len(records)}")
    return DataSets(records, tuple(notes))


def _load(data: Data, cache_dir: Path | None, progress: bool) -> DataSets:
    images = load_images(data, cache_dir, progress)
    return with_beside(images, load_beside(images, data, cache_folder(data.latents_cache_dir), progress), data)


def _different(names: Sequence[str]) -> list[str]:
    """Names, numbered where they are the same."""
    return [name if names.count(name) == 1 else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]
