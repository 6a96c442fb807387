"""Fill the cache: every crop and every prompt is encoded once, before training."""

from __future__ import annotations

import functools
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dreamlora.data.cache import CHECKED_WHOLE, Entry, KeyPart, Layout, TensorCache, Wanted, content_key, is_finite
from dreamlora.data.catalog import RecordSubset, hash_prefixes
from dreamlora.data.conditioning_crops import conditioning_plan, store_conditioning
from dreamlora.data.images import ImageRecord
from dreamlora.data.mask_crops import mask_plan, store_masks
from dreamlora.data.shown_prompts import Prompt, prompt_key, text_of
from dreamlora.data.stores import RAM_BYTES, LatentStore, PromptStore, Recent
from dreamlora.data.transforms import Preparations, Variant, crop, to_tensor, variants, view_of
from dreamlora.errors import UserError
from dreamlora.interfaces import Conditioning, Latents, LatentSize, View


def _nothing(images: Any) -> Conditioning:
    return {}


@dataclass(frozen=True)
class Filling:
    """How the cache is filled.

    Attributes:
        cache: where entries are kept.
        key_parts: whatever else decides what the encoder makes: model, revision, autoencoder, dtype, for prompts also
            the number of tokens.
        rank: of this process among those that share the cache folder.
        world: number of these processes. Each makes its share of the entries; the caller waits for all of them before
            it reads from a store.
        workers: processes that read and crop images; 0 for none besides this one.
        in_turns: makes calls of the prompts' encoder, given it and what each is called with (``Parts.in_turns``).
        together: how many calls at a time.
        batch_size: images or prompts per call of the encoder. Above 1 it is faster on some GPUs, but then the last bits
            of an entry depend on what happened to be in its batch, so on what the cache held before.
        ram_bytes: bound of what a store keeps in RAM.
        latents: what the autoencoder makes, so that entries can be told from what it cannot have made; None: unknown.
        describe: what else is kept of an image (``Family.describe_views``).
        length_axes: see ``Family.LENGTH_AXES``. Where there are any, prompts are encoded one by one, without padding.
        progress: show a bar (in the process of rank 0).
    """

    cache: TensorCache
    key_parts: Mapping[str, KeyPart]
    rank: int = 0
    world: int = 1
    workers: int = 0
    in_turns: Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]] = map
    together: int = 1
    batch_size: int = 1
    ram_bytes: int = RAM_BYTES
    latents: LatentSize | None = None
    describe: Callable[[Sequence[View]], Conditioning] = _nothing
    length_axes: Mapping[str, int] = field(default_factory=dict)
    progress: bool = True

    def bar(self, items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
        """``items`` with a progress bar; silent if there are none."""
        silent = self.silent or total == 0
        delay = 2 if total is None else 0  # how much of it is to be encoded is not known
        return tqdm(items, desc=f"encoding {what}s", unit=what, total=total, delay=delay, disable=silent)

    @property
    def silent(self) -> bool:
        """Whether this process shows no bars."""
        return not self.progress or self.rank != 0


def encode_dataset(
    records: Sequence[ImageRecord],
    how: Preparations,
    encode: Callable[[Tensor], Latents],
    filling: Filling,
    encode_conditioning: Callable[[np.ndarray], Conditioning] = _nothing,
) -> LatentStore:
    """Encode all variants of all images that the cache lacks, and crop their masks.

    Args:
        records: the images.
        how: resolution, crops and mirroring, by data set.
        encode: takes pixels ``[B, 3, H, W]`` float32 in [-1, 1] on the CPU. Not called if nothing is missing, so it may
            load the autoencoder when first called.
        filling: where and how.
        encode_conditioning: takes a crop ``[H, W, 3]`` (uint8) of an image before an edit; gives tensors with a
            leading 1.

    Raises:
        UserError: an image is broken or changes meanwhile, its latents are not finite, or the cache cannot be written.
    """
    jobs = _jobs(records, how, filling)
    crops = DataLoader(
        _Crops(records, jobs, how, filling),
        batch_size=None,
        num_workers=min(filling.workers, len(jobs)),
        collate_fn=_as_is,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    with torch.no_grad():
        for batch in _batches(filling.bar(crops, "image", len(jobs)), filling.batch_size):
            _store(batch, encode, filling)
    masked = array("q", (index for index, record in enumerate(records) if record.mask))
    share = RecordSubset(records, masked[filling.rank :: filling.world])
    store_masks(filling.bar(share, "mask", len(share)), how, filling.cache)
    conditioned = array("q", (index for index, record in enumerate(records) if record.conditioning))
    share = RecordSubset(records, conditioned[filling.rank :: filling.world])
    bar = filling.bar(share, "conditioning image", len(share))
    with torch.no_grad():
        store_conditioning(bar, how, encode_conditioning, filling.cache, filling.key_parts)
    return LatentStore(
        records,
        lambda record: [wanted for wanted, _ in _plan(record, how, filling)],
        Recent(filling.cache, filling.ram_bytes),
        lambda record: [wanted for wanted, _ in mask_plan(record, how)],
        lambda record: [wanted for wanted, _ in conditioning_plan(record, how, filling.key_parts)],
    )


def bytes_of(records: Sequence[ImageRecord], how: Preparations, latents: LatentSize | None) -> int:
    """How much the latents of all variants of all images are at most; 0 where it is not known what latents are."""
    if latents is None:
        return 0
    most = [1 if own.center_crop else own.crop_variants * (1 + own.random_flip) for own in how.each]
    sizes = Counter((record.dataset, how[record].target(record.facts.size)) for record in records)
    return sum(count * most[number] * _bytes(_latent_layout(size, latents)) for (number, size), count in sizes.items())


def bytes_lacking(records: Sequence[ImageRecord], how: Preparations, filling: Filling) -> int:
    """How much of them the cache does not hold yet. Each entry is looked up, which takes a while for many images."""
    wanted = {place for record in records for place, _ in _plan(record, how, filling)}
    return sum(_bytes(place.layout or ()) for place in wanted if filling.cache.look(place, thorough=False) is None)


def _bytes(layout: Layout) -> int:
    """Of an entry, whose numbers are float32."""
    return sum(4 * math.prod(side or 1 for side in shape) for _, _, shape in layout)


def encode_prompts(
    prompts: Iterable[Prompt], encode: Callable[[list[Any]], Conditioning], filling: Filling
) -> PromptStore:
    """Encode all different prompts that the cache lacks.

    Args:
        prompts: may repeat.
        encode: gives tensors with one row per prompt; kept in their dtype. Not called if nothing is missing.
        filling: where and how.

    Returns:
        Prompt to embeddings, each tensor with a batch dimension of 1.

    Raises:
        UserError: embeddings are not finite, or the cache cannot be written.
    """

    def key_of(prompt: Prompt) -> str:
        return prompt_key(prompt, filling.key_parts)

    work = _Prompts(encode, filling)
    with torch.no_grad():
        for number, prompt in enumerate(filling.bar(prompts, "prompt")):
            key = key_of(prompt)
            if int(key[:8], 16) % filling.world == filling.rank:  # a prompt has one process
                work.see(key, prompt, thorough=number < CHECKED_WHOLE)
        work.finish()
    return PromptStore(key_of, Recent(filling.cache, filling.ram_bytes), work.layout)


class _Prompts:
    """Prompts, of which those that the cache lacks are encoded.

    All embeddings of one encoder are alike, but for their length where that is the prompt's own: where an entry differs
    from those before it, the encoder decides.

    Attributes:
        layout: of the entries so far; None: there are none.
    """

    def __init__(self, encode: Callable[[list[Any]], Conditioning], filling: Filling) -> None:
        self.layout: Layout | None = None
        self._encode = encode
        self._filling = filling
        self._cache = filling.cache
        self._at_once = 1 if filling.length_axes else filling.batch_size
        self._most = self._at_once * filling.together
        self._axes = filling.length_axes
        self._waiting: dict[str, Prompt] = {}
        self._believed: dict[str, Prompt] = {}
        self._made = False

    def see(self, key: str, prompt: Prompt, thorough: bool) -> None:
        """Encode a prompt, given by key, if the cache lacks it; maybe later, with others."""
        if key in self._waiting or key in self._believed:
            return
        found = self._look(Wanted(key, self.layout), thorough)
        if found is None:
            self._waiting[key] = prompt
        elif not self._made and len(self._believed) < CHECKED_WHOLE:
            self._believed[key] = prompt
        self.layout = self.layout or found
        if len(self._waiting) >= self._most:
            self.finish()

    def _look(self, wanted: Wanted, thorough: bool) -> Layout | None:
        """What the cache holds, with None for lengths that are a prompt's own."""
        found = self._cache.look(wanted, thorough)
        if found is None:
            return None
        return tuple(
            (name, kind, tuple(None if axis == self._axes.get(name) else side for axis, side in enumerate(shape)))
            for name, kind, shape in found
        )

    def finish(self) -> None:
        """Encode what waits."""
        if not self._waiting:
            return
        self._store()
        made = self._look(Wanted(next(iter(self._waiting)), None), thorough=False)
        self._waiting = {}
        if self._made or made == self.layout or self.layout is None:
            self.layout, self._made = made, True
            return
        if len(self._believed) >= CHECKED_WHOLE:
            raise UserError(
                f"the cache {self._cache.folder} has embeddings of other shapes than the text encoder makes: remove it"
            )
        self.layout, self._made = made, True
        for key, prompt in self._believed.items():
            self._waiting[key] = prompt
            if len(self._waiting) >= self._most:
                self.finish()
        self._believed = {}
        self.finish()

    def _store(self) -> None:
        batches = list(_batches([list(self._waiting.items())], self._at_once))
        for batch, rows in zip(batches, self._filling.in_turns(self._rows, batches), strict=True):
            for row, (key, prompt) in enumerate(batch):
                entry = {name: tensor[row : row + 1] for name, tensor in rows.items()}
                _refuse_non_finite(
                    entry, f"the text encoder gave numbers that are not finite for the prompt {text_of(prompt)!r}"
                )
                self._cache.put(key, entry)

    def _rows(self, batch: Sequence[tuple[str, Prompt]]) -> Conditioning:
        """Embeddings of prompts, given by key, in one call."""
        encoded = self._encode([prompt for _, prompt in batch])
        return {name: tensor.detach().cpu() for name, tensor in encoded.items()}


Plan = list[tuple[Wanted, Variant]]
"""The cache entry of every variant of one image."""


def _plan(record: ImageRecord, how: Preparations, filling: Filling) -> Plan:
    facts, own, parts = record.facts, how[record], filling.key_parts
    described = _described(facts.size, filling)
    layout = tuple(sorted((*_latent_layout(own.target(facts.size), filling.latents), *described)))
    return [
        (
            Wanted(content_key("latents", facts.content_hash, each, own.resolution, own.interpolation, parts), layout),
            each,
        )
        for each in variants(facts.size, facts.content_hash, own)
    ]


def _described(size: tuple[int, int], filling: Filling) -> Layout:
    """What an entry holds of its view; the same for all images."""
    described = filling.describe([View(size, (0, 0), size)])
    return tuple((name, "F32", tuple(tensor.shape[1:])) for name, tensor in described.items())


@functools.cache
def _latent_layout(size: tuple[int, int], latents: LatentSize | None) -> Layout:
    shape: tuple[int | None, ...] = (None, None, None)
    if latents:
        shape = (latents.channels, size[1] // latents.pixels, size[0] // latents.pixels)
    return ("mean", "F32", shape), ("std", "F32", shape)


def _jobs(records: Sequence[ImageRecord], how: Preparations, filling: Filling) -> array[int]:
    """Which images this process is to encode. Copies that are prepared alike count once.

    Shared out before looking what is missing: that changes while others work.
    """
    ways = np.fromiter((how.each.index(how[record]) for record in records), np.uint64)
    _, first = np.unique(np.stack([hash_prefixes(records), ways]), axis=1, return_index=True)
    share = np.sort(first)[filling.rank :: filling.world]
    jobs = array("q")
    bar = tqdm(share, desc="checking the cache", unit="image", delay=3, leave=False, disable=filling.silent)
    for number, index in enumerate(bar):
        plan = _plan(records[int(index)], how, filling)
        if filling.cache.missing((wanted for wanted, _ in plan), thorough=number < CHECKED_WHOLE):
            jobs.append(int(index))
    return jobs


class _Crop(NamedTuple):
    key: str
    where: str
    pixels: np.ndarray
    view: View


class _Crops(Dataset):
    """The crops of every job, or the error that prevents them.

    Arrays, not tensors: DataLoader sends tensors through shared memory, which containers keep small. The error is a
    value, because DataLoader would wrap its message in a traceback.
    """

    def __init__(self, records: Sequence[ImageRecord], jobs: array[int], how: Preparations, filling: Filling) -> None:
        self._records = records
        self._jobs = jobs
        self._how = how
        self._filling = filling

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, index: int) -> list[_Crop] | UserError:
        record = self._records[self._jobs[index]]
        plan = dict(_plan(record, self._how, self._filling))
        lacking = {place.key: variant for place, variant in plan.items() if not self._filling.cache.holds(place)}
        if not lacking:
            return []
        try:
            image, facts = record.decoded()
            if facts.content_hash != record.content_hash():
                raise UserError(f"the image {record.where} changed while it was being read: start again")
        except UserError as error:
            return error
        return [
            _Crop(key, record.where, crop(image, variant, self._how[record]), view_of(image.size, variant))
            for key, variant in lacking.items()
        ]


def _as_is(crops: Any) -> Any:
    return crops


def _batches(groups: Iterable[list[Any] | UserError], size: int) -> Iterator[list[Any]]:
    """The members of all groups, ``size`` at a time; raises a group that is an error."""
    waiting: list[Any] = []
    for group in groups:
        if isinstance(group, UserError):
            raise group
        waiting += group
        while len(waiting) >= size:
            yield waiting[:size]
            del waiting[:size]
    if waiting:
        yield waiting


def _store(batch: list[_Crop], encode: Callable[[Tensor], Latents], filling: Filling) -> None:
    """Encode crops, those of one size in one call."""
    by_shape: dict[tuple[int, ...], list[_Crop]] = {}
    for each in batch:
        by_shape.setdefault(each.pixels.shape, []).append(each)
    for crops in by_shape.values():
        latents = encode(torch.stack([to_tensor(crop.pixels) for crop in crops]))
        means, stds = latents.mean.float().cpu(), latents.std.float().cpu()
        views = filling.describe([crop.view for crop in crops])
        for row, each in enumerate(crops):
            entry = {"mean": means[row], "std": stds[row]}
            _refuse_non_finite(
                entry,
                f"the autoencoder gave numbers that are not finite for the image {each.where}: its weights may be "
                "damaged, or unfit for their precision; try another --pretrained_vae_model_name_or_path",
            )
            filling.cache.put(each.key, entry | {name: tensor[row] for name, tensor in views.items()})


def _refuse_non_finite(entry: Entry, message: str) -> None:
    if not all(map(is_finite, entry.values())):
        raise UserError(message)
