"""What training reads of the cache: encoded images and prompts, looked up when they are asked for."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dreamlora.data.cache import Entry, Layout, TensorCache, Wanted
from dreamlora.data.images import ImageRecord
from dreamlora.data.shown_prompts import Prompt
from dreamlora.interfaces import Conditioning

RAM_BYTES = 2**27
"""Of encoded images, and again of prompts; about a thousand images of Stable Diffusion at 512 pixels."""
KEYS_KEPT = 4096
"""Images whose variants' keys stay in RAM; drawing random crops again takes a fraction of a millisecond."""
_OBJECT_BYTES = 1500
"""What an entry takes besides its numbers: a dictionary, keys and two tensor objects."""


class Recent:
    """A cache's most recently used entries, kept in RAM up to ``limit`` bytes; small sets stay there wholly.

    What does not fit is read again when it is asked for, mostly from the system's own file cache.

    The same tensors are given out each time: they must not be changed in place.
    """

    def __init__(self, cache: TensorCache, limit: int = RAM_BYTES) -> None:
        self._cache = cache
        self._limit = limit
        self._used = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def __getitem__(self, wanted: Wanted) -> Entry:
        key = wanted.key
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        entry = self._cache.load(wanted)
        self._entries[key] = entry
        self._used += _nbytes(entry)
        while self._used > self._limit:
            self._used -= _nbytes(self._entries.popitem(last=False)[1])
        return entry


def _nbytes(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values()) + _OBJECT_BYTES


class Column(Sequence[Any]):
    """One attribute of every record, looked up when it is asked for."""

    def __init__(self, records: Sequence[ImageRecord], of: Callable[[ImageRecord], Any]) -> None:
        self._records = records
        self._of = of

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._of(self._records[index])


class LatentStore:
    """Encoded images by index and variant, read from the cache when first asked for.

    Args:
        records: the images.
        places: gives the entries of an image's variants.
        entries: of the cache.
        mask_places: the same of its mask; none for an image without one.
        conditioning_places: the same of its conditioning image.

    Attributes:
        names: one per image, for error messages.
        captions: one or several per image.
        content_hashes: one per image: its identity, whatever its name.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        places: Callable[[ImageRecord], Sequence[Wanted]],
        entries: Recent,
        mask_places: Callable[[ImageRecord], Sequence[Wanted]] = lambda record: (),
        conditioning_places: Callable[[ImageRecord], Sequence[Wanted]] = lambda record: (),
    ) -> None:
        self.names: Sequence[str] = Column(records, lambda record: record.name)
        self.captions: Sequence[tuple[str, ...]] = Column(records, lambda record: record.captions)
        self.content_hashes: Sequence[str] = Column(records, lambda record: record.content_hash())
        self._records = records
        self._places = functools.lru_cache(maxsize=KEYS_KEPT)(lambda index: places(records[index]))
        self._mask_places = functools.lru_cache(maxsize=KEYS_KEPT)(lambda index: mask_places(records[index]))
        self._conditioning_places = functools.lru_cache(maxsize=KEYS_KEPT)(
            lambda index: conditioning_places(records[index])
        )
        self._entries = entries

    def __len__(self) -> int:
        return len(self._records)

    def count(self, index: int) -> int:
        """How many variants (crops, mirrored or not) there are of an image."""
        return len(self._places(index))

    def latents(self, index: int, variant: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each ``[C, h, w]`` float32; not to be changed in place.

        Raises:
            UserError: the cache file was removed or damaged during the run.
        """
        entry = self._entries[self._places(index)[variant]]
        return entry["mean"], entry["std"]

    def view(self, index: int, variant: int) -> Conditioning:
        """What belongs to the image besides (``Family.describe_views`` and ``encode_conditioning``), each with a
        leading 1.

        Raises:
            UserError: see ``latents``.
        """
        entry = self._entries[self._places(index)[variant]]
        view = {name: tensor[None] for name, tensor in entry.items() if name not in ("mean", "std")}
        places = self._conditioning_places(index)
        if places:
            view |= {name: tensor[None] for name, tensor in self._entries[places[variant]].items()}
        return view

    def mask(self, index: int, variant: int) -> Tensor | None:
        """How much of the loss every place of the latents has: ``[1, h, w]`` float32 in [0, 1]; None: all the same.

        Raises:
            UserError: see ``latents``.
        """
        places = self._mask_places(index)
        if not places:
            return None
        mask = self._entries[places[variant]]["mask"].float().div(255)
        height, width = self.latents(index, variant)[0].shape[-2:]
        return adaptive_avg_pool2d(mask, (height, width))

    def masks(self) -> Tensor | None:
        """``[images, 1, h, w]`` of the first variants, white for an image without a mask; None if none has one."""
        masks = [self.mask(index, 0) for index in range(len(self))]
        white = next((torch.ones_like(mask) for mask in masks if mask is not None), None)
        return None if white is None else torch.stack([white if mask is None else mask for mask in masks])

    def views(self) -> Conditioning:
        """``view`` of the first variants, ``[images, ...]``."""
        each = [self.view(index, 0) for index in range(len(self))]
        return {name: torch.cat([view[name] for view in each]) for name in (each[0] if each else ())}


class PromptStore:
    """Embeddings by prompt, with a batch dimension of 1, read from the cache when first asked for.

    Args:
        key: of a prompt.
        entries: of the cache.
        layout: of all of them; None: there are none.
    """

    def __init__(self, key: Callable[[Prompt], str], entries: Recent, layout: Layout | None) -> None:
        self._key = key
        self._entries = entries
        self._layout = layout

    def __getitem__(self, prompt: Prompt) -> Entry:
        """The entry of a prompt that was encoded before.

        Raises:
            UserError: it was not, or was removed during the run.
        """
        return self._entries[Wanted(self._key(prompt), self._layout)]
