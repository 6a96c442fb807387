"""Encoded images and prompts on disk, found by what went into them.

An entry's name is the hash of everything that decides its content, so a changed image, option or model means another
entry, and never a wrong one. Entries carry a digest and are checked whenever they are read. Nothing is ever deleted,
but for damaged entries: the folder can be removed at any time between runs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError, WriteError
from dreamlora.files import replacing

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Part of every key: to be raised whenever images are decoded, resized or stored differently.

2: colours are converted to sRGB by the profiles in the files.
"""

CHECKED_WHOLE = 1000
"""Entries that are read whole and checked before a run; of more, which would take minutes, only the headers are."""

Entry = dict[str, Tensor]
KeyPart = str | int | float | bool | None

RAM_BYTES = 2**27
"""Of encoded images, and again of prompts; about a thousand images of Stable Diffusion at 512 pixels."""
KEYS_KEPT = 4096
"""Images whose variants' keys stay in RAM; drawing random crops again takes a fraction of a millisecond."""
_OBJECT_BYTES = 1500
"""What an entry takes besides its numbers: a dictionary, keys and two tensor objects."""


class DamagedEntry(Exception):
    """A cache file that is not what was written."""


def content_key(kind: str, *parts: object) -> str:
    """SHA-256, in hexadecimal, of ``parts``: anything JSON can say without ambiguity, mappings in any order."""
    text = json.dumps([CACHE_FORMAT, kind, *parts], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class TensorCache:
    """Named tensors by key, one safetensors file each: ``<folder>/ab/abcdef....safetensors``.

    Files are written under a temporary name and then renamed. So any number of processes may share the folder: at
    worst, two of them make the same entry.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def file(self, key: str) -> Path:
        """Where the entry lies, or would lie."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def missing(self, keys: Iterable[str], thorough: bool = True) -> list[str]:
        """The different ones of ``keys`` without a sound entry, in order; warns of damage.

        Args:
            thorough: read every entry whole. Else only its header is read, and damage that leaves the file's length as
                it was is found when the entry is used.
        """
        absent = []
        for key in dict.fromkeys(keys):
            try:
                self._read(key) if thorough else self._glance(key)
            except FileNotFoundError:
                absent.append(key)
            except DamagedEntry as damage:
                logger.warning("%s is damaged (%s): it is encoded again", self.file(key), damage)
                absent.append(key)
        return absent

    def holds(self, key: str) -> bool:
        """Whether there is a sound entry."""
        try:
            self._read(key)
        except (FileNotFoundError, DamagedEntry):
            return False
        return True

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store an entry, replacing one that is there.

        Raises:
            WriteError: the disk is full or the folder cannot be written to.
        """
        # copies, because safetensors refuses tensors that share memory
        whole = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        data = safetensors.torch.save(whole, {"sha256": _digest(key, whole)})
        try:
            with replacing(self.file(key)) as temporary:
                temporary.write_bytes(data)
        except WriteError as error:
            error.args = (
                f"cannot write to the cache {self.folder}: {error.reason}. Make room there, or choose another place "
                "with --latents_cache_dir",
            )
            raise

    def load(self, key: str) -> Entry:
        """The entry, as fresh tensors on the CPU. A damaged one is removed, so that the next start makes it anew.

        Raises:
            UserError: it vanished or was damaged since ``missing`` found it sound.
        """
        try:
            return self._read(key)
        except (FileNotFoundError, DamagedEntry) as error:
            with contextlib.suppress(OSError):
                self.file(key).unlink(missing_ok=True)
            raise UserError(
                f"the cached file {self.file(key)} was removed or damaged during the run: start again, to make it anew"
            ) from error

    def _glance(self, key: str) -> None:
        """Raises what ``_read`` does, as far as header and length tell."""
        with self.file(key).open("rb") as file:
            try:
                start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start - 8))
                del header["__metadata__"]
                length = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
                whole = length == os.fstat(file.fileno()).st_size
            except Exception as error:  # see _read
                raise DamagedEntry(str(error) or type(error).__name__) from error
        if not whole:
            raise DamagedEntry("its length is not what its header says")

    def _read(self, key: str) -> Entry:
        """Raises FileNotFoundError, or DamagedEntry with the reason."""
        try:
            data = self.file(key).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot read the cache {self.folder}: {error.strerror}. Mend its permissions, or choose another place "
                "with --latents_cache_dir"
            ) from error
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            tensors = safetensors.torch.load(data)
            intact = header["__metadata__"]["sha256"] == _digest(key, tensors)
        except Exception as error:  # a damaged header can make the parsers raise anything
            raise DamagedEntry(str(error) or type(error).__name__) from error
        if not intact:
            raise DamagedEntry("its content does not match its checksum")
        return tensors


def _digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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

    def __getitem__(self, key: str) -> Entry:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        entry = self._cache.load(key)
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
        keys: gives the cache keys of an image's variants.
        entries: of the cache.
        mask_keys: the same of its mask; none for an image without one.

    Attributes:
        names: one per image, for error messages.
        captions: one or several per image.
        content_hashes: one per image: its identity, whatever its name.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        keys: Callable[[ImageRecord], Sequence[str]],
        entries: Recent,
        mask_keys: Callable[[ImageRecord], Sequence[str]] = lambda record: (),
    ) -> None:
        self.names: Sequence[str] = Column(records, lambda record: record.name)
        self.captions: Sequence[tuple[str, ...]] = Column(records, lambda record: record.captions)
        self.content_hashes: Sequence[str] = Column(records, lambda record: record.content_hash())
        self._records = records
        self._keys = functools.lru_cache(maxsize=KEYS_KEPT)(lambda index: keys(records[index]))
        self._mask_keys = functools.lru_cache(maxsize=KEYS_KEPT)(lambda index: mask_keys(records[index]))
        self._entries = entries

    def __len__(self) -> int:
        return len(self._records)

    def count(self, index: int) -> int:
        """How many variants (crops, mirrored or not) there are of an image."""
        return len(self._keys(index))

    def latents(self, index: int, variant: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each ``[C, h, w]`` float32; not to be changed in place.

        Raises:
            UserError: the cache file was removed or damaged during the run.
        """
        entry = self._entries[self._keys(index)[variant]]
        return entry["mean"], entry["std"]

    def mask(self, index: int, variant: int) -> Tensor | None:
        """How much of the loss every place of the latents has: ``[1, h, w]`` float32 in [0, 1]; None: all the same.

        Raises:
            UserError: see ``latents``.
        """
        keys = self._mask_keys(index)
        if not keys:
            return None
        mask = self._entries[keys[variant]]["mask"].float().div(255)
        height, width = self.latents(index, variant)[0].shape[-2:]
        return adaptive_avg_pool2d(mask, (height, width))

    def masks(self) -> Tensor | None:
        """``[images, 1, h, w]`` of the first variants, white for an image without a mask; None if none has one."""
        masks = [self.mask(index, 0) for index in range(len(self))]
        white = next((torch.ones_like(mask) for mask in masks if mask is not None), None)
        return None if white is None else torch.stack([white if mask is None else mask for mask in masks])


class PromptStore:
    """Embeddings by prompt, with a batch dimension of 1, read from the cache when first asked for."""

    def __init__(self, key: Callable[[str], str], entries: Recent) -> None:
        self._key = key
        self._entries = entries

    def __getitem__(self, prompt: str) -> Entry:
        """The entry of a prompt that was encoded before.

        Raises:
            UserError: it was not, or was removed during the run.
        """
        return self._entries[self._key(prompt)]
