"""Encoded images and prompts on disk, found by what went into them.

An entry's name is the hash of everything that decides its content, so a changed image, option or model means another
entry, and never a wrong one. Entries carry a digest, and have the tensors that their reader expects, or they are
damaged; ``cache_folder`` says whose count. Nothing is ever deleted, but for damaged entries: the folder can be removed
at any time between runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from dreamlora.cache_folder import counts, own_place
from dreamlora.errors import UserError, WriteError
from dreamlora.files import replacing
from dreamlora.reading import UnreadableError, json_of, opened, shortened

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Part of every key: to be raised whenever images are decoded, resized or stored differently.

2: colours are converted to sRGB by the profiles in the files.
"""

CHECKED_WHOLE = 1000
"""Entries that are read whole and checked before a run; of more, which would take minutes, only the headers are."""

ENTRY_BYTES = 2**28
"""Of one entry; the embedding of a prompt of 512 tokens has some megabytes."""
HEADER_BYTES = 2**13

Entry = dict[str, Tensor]
Layout = tuple[tuple[str, str, tuple[int | None, ...]], ...]
"""Names of an entry's tensors, in order, with type (in safetensors' words) and shape; a length of None can be any."""
KeyPart = str | int | float | bool | None


class DamagedEntry(Exception):
    """A cache file that is not what was written."""


class ForeignEntry(DamagedEntry):
    """One that somebody else wrote, whose word does not count here; ``cache_folder`` tells of it."""


class Wanted(NamedTuple):
    """An entry, and what must be in it; None: whatever is."""

    key: str
    layout: Layout | None


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
        """Where the entry of the user who runs lies, or would lie."""
        return _file(own_place(self.folder), key)

    def missing(self, wanted: Iterable[Wanted], thorough: bool = True) -> list[str]:
        """The different keys of ``wanted`` without a sound entry, in order; warns of damage.

        Args:
            wanted: entries.
            thorough: read every entry whole. Else only its header is read, and damage that leaves the file's length as
                it was is found when the entry is used.
        """
        return [each.key for each in dict.fromkeys(wanted) if self.look(each, thorough) is None]

    def look(self, wanted: Wanted, thorough: bool = True) -> Layout | None:
        """What a sound entry holds; None if there is none. Warns of damage; see ``missing``."""
        try:
            if thorough:
                return self._read(wanted)[1]
            return _parsed(*self._bytes(wanted.key, HEADER_BYTES), wanted.layout)[0]
        except ForeignEntry:
            return None
        except FileNotFoundError:
            return None
        except DamagedEntry as damage:
            logger.warning("%s is damaged (%s): it is encoded again", self.file(wanted.key), damage)
            return None

    def holds(self, wanted: Wanted) -> bool:
        """Whether there is a sound entry."""
        try:
            self._read(wanted)
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

    def load(self, wanted: Wanted) -> Entry:
        """The entry, as fresh tensors on the CPU. A damaged one is removed, so that the next start makes it anew.

        Raises:
            UserError: it vanished or was damaged since ``missing`` found it sound.
        """
        try:
            return self._read(wanted)[0]
        except (FileNotFoundError, DamagedEntry) as error:
            file = self.file(wanted.key)
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            raise UserError(
                f"the cached file {file} was removed or damaged during the run: start again, to make it anew"
            ) from error

    def _read(self, wanted: Wanted) -> tuple[Entry, Layout]:
        """The entry; raises FileNotFoundError, or DamagedEntry with the reason."""
        data, length = self._bytes(wanted.key, ENTRY_BYTES)
        layout, digest = _parsed(data, length, wanted.layout)
        try:
            tensors = safetensors.torch.load(data)
            intact = digest == _digest(wanted.key, tensors)
        except Exception as error:  # a damaged header can make the parsers raise anything
            raise DamagedEntry(str(error) or type(error).__name__) from error
        if not intact:
            raise DamagedEntry("its content does not match its checksum")
        if not all(map(is_finite, tensors.values())):
            raise DamagedEntry("it has numbers that are not finite")
        return tensors, layout

    def _bytes(self, key: str, most: int) -> tuple[bytes, int]:
        """The first ``most`` bytes of an entry, and how many it has; raises what ``_read`` does."""
        failure: Exception = FileNotFoundError(key)
        for file in self._files(key):
            try:
                return self._bytes_of(file, most)
            except FileNotFoundError:
                continue
            except DamagedEntry as damage:
                failure = damage
        raise failure

    def _files(self, key: str) -> Iterator[Path]:
        yield self.file(key)
        if own_place(self.folder) != self.folder:
            yield _file(self.folder, key)

    def _bytes_of(self, file: Path, most: int) -> tuple[bytes, int]:
        if file.is_symlink():
            raise DamagedEntry("it is a link")
        try:
            with opened(file) as stream:
                status = os.fstat(stream.fileno())
                if not counts(status.st_uid, self.folder):
                    raise ForeignEntry("another user wrote it")
                if status.st_size > ENTRY_BYTES:
                    raise DamagedEntry(f"it has {status.st_size} bytes")
                return stream.read(min(most, status.st_size)), status.st_size
        except UnreadableError as error:
            if not isinstance(error.__cause__, OSError) or file != self.file(file.stem):
                raise DamagedEntry(error.reason) from error
            raise UserError(
                f"cannot read the cache {self.folder}: {error.reason}. Mend its permissions, or choose another place "
                "with --latents_cache_dir"
            ) from error


def _file(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _parsed(data: bytes, length: int, wanted: Layout | None) -> tuple[Layout, str]:
    """What the beginning of an entry says of its tensors, and their checksum.

    Args:
        data: the beginning.
        length: of the entry in bytes.
        wanted: see ``Wanted``.

    Raises:
        DamagedEntry: it cannot be read, or says something else than the length or ``wanted``.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if start > min(len(data), HEADER_BYTES):
        raise DamagedEntry("its header is cut or too long")
    try:
        header = json_of(data[8:start])
        digest = header.pop("__metadata__")["sha256"]
        tensors = sorted((name, str(told["dtype"]), tuple(map(int, told["shape"]))) for name, told in header.items())
        end = start + max((int(told["data_offsets"][1]) for told in header.values()), default=0)
    except Exception as error:  # it can be anything
        raise DamagedEntry(shortened(str(error) or type(error).__name__)) from error
    if end != length:
        raise DamagedEntry("its length is not what its header says")
    found = tuple(tensors)
    if wanted is not None and not _fits(found, wanted):
        raise DamagedEntry(f"it holds {shortened(str(found))} instead of {wanted}")
    return found, digest


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # the ends are NaN if anything is; ten times as fast as to ask every number
    return all(end.isfinite() for end in tensor.aminmax())


def _fits(found: Layout, wanted: Layout) -> bool:
    if [each[:2] for each in found] != [each[:2] for each in wanted]:
        return False
    pairs = [(shape, other) for (*_, shape), (*_, other) in zip(found, wanted, strict=True)]
    return all(
        len(shape) == len(other) and all(b in (None, a) for a, b in zip(shape, other, strict=True))
        for shape, other in pairs
    )


def _digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
