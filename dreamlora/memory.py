"""How much memory every stage of a program takes at most; and what is said where it does not suffice."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dreamlora.errors import LackOfMemoryError, UserError, is_of_memory, lack_of_memory

GIB = 2**30
ELSEWHERE = "between the stages"
ALLOCATED, RESERVED, RESIDENT = "allocated", "reserved", "resident"
"""Kinds of memory: in tensors on the GPU; what torch holds of the GPU for that; of the process, in the computer's."""

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch's allocator on GPUs reads from the environment, under its new name and its old one."""
_SEGMENTS = "expandable_segments:True"
_HOST = re.compile(r"DefaultCPUAllocator|alloc_cpu|can't allocate memory|killed by signal|shared memory", re.IGNORECASE)

Owner = TypeVar("Owner")


class Meter(Protocol):
    """Counts memory of one or more kinds."""

    def reset(self) -> None:
        """Begin anew, from what is held now."""

    def peaks(self) -> dict[str, int]:
        """Bytes by kind: the most since the last ``reset``."""


class CudaMeter:
    """What torch has had of a GPU, by its own count, which takes no time and waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """See ``Meter``."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peaks(self) -> dict[str, int]:
        """See ``Meter``."""
        return {
            ALLOCATED: torch.cuda.max_memory_allocated(self._device),
            RESERVED: torch.cuda.max_memory_reserved(self._device),
        }


class ProcessMeter:
    """The most that this process ever had of the computer's memory, by Linux' count; other systems are not asked.

    That mark can only rise (to lower it would spoil it for whoever else looks), so a stage is known to have come so far
    only if it came farther than all before it.

    Args:
        status: Linux' account of the process.
    """

    def __init__(self, status: Path = Path("/proc/self/status")) -> None:
        self._status = status
        self._before = 0

    def reset(self) -> None:
        """See ``Meter``."""
        self._before = self._mark()

    def peaks(self) -> dict[str, int]:
        """See ``Meter``; nothing where the mark has not risen."""
        mark = self._mark()
        return {RESIDENT: mark} if mark > self._before else {}

    def _mark(self) -> int:
        try:
            found = re.search(r"^VmHWM:\s*(\d+) kB", self._status.read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            return 0
        return int(found[1]) * 1024 if found else 0


def meters_of(device: torch.device) -> list[Meter]:
    """What counts for a program on this device."""
    process = ProcessMeter()
    return [CudaMeter(device), process] if device.type == "cuda" else [process]


@dataclass(frozen=True)
class Shortage:
    """What there was when memory did not suffice.

    Attributes:
        stage: in which that was; "": in none.
        on_host: whether it was the computer's memory; else the GPU's.
        peak: bytes of the stage at most; None: unknown.
        total: bytes that the GPU has; None: unknown, or no GPU's.
        held: bytes by part, of what the program knows that it holds there.
    """

    stage: str
    on_host: bool
    peak: int | None = None
    total: int | None = None
    held: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """What was held, in a sentence; empty if nothing is known."""
        parts = [f"{part} {_gib(size)}" for part, size in self.held.items() if size]
        if self.peak is None:
            return f"Held were, in GiB: {', '.join(parts)}" if parts else ""
        of = f" of {_gib(self.total)}" if self.total else ""
        rest = max(self.peak - sum(self.held.values()), 0)
        listed = f": {', '.join(parts)}, activations and all else {_gib(rest)}" if parts else ""
        where = "" if self.on_host else " on the GPU"
        return f"At most {_gib(self.peak)}{of} GiB were in use{where}{listed}"


class StageMemory:
    """Peaks by stage. Stages may lie in each other; what counts in an inner one does not in the outer.

    Args:
        device: of the program.
        meters: that count.

    Attributes:
        device: as given.
        shortage: the first stage that memory did not suffice for; None: there was none.
    """

    def __init__(self, device: torch.device, meters: Sequence[Meter] | None = None) -> None:
        self.shortage: Shortage | None = None
        self.device = device
        self._meters = meters_of(device) if meters is None else meters
        self._open = [ELSEWHERE]
        self._peaks: dict[str, dict[str, int]] = {}
        self._holders: list[tuple[str, Callable[[], Iterable[Tensor]]]] = []
        for meter in self._meters:
            meter.reset()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block for this stage; one that comes again has its highest peak."""
        self._count()
        self._peaks.setdefault(name, {})
        self._open.append(name)
        try:
            yield
        except Exception as error:
            if is_of_memory(error):
                self.note(error)
            raise
        finally:
            self._count()
            self._open.pop()

    def holds(self, part: str, owner: Owner, tensors: Callable[[Owner], Iterable[Tensor]]) -> None:
        """Tell of something that holds memory, for as long as it lives; it is not kept alive.

        Args:
            part: its name. Several owners may have one.
            owner: whose tensors they are.
            tensors: gives them.
        """
        found = weakref.ref(owner)
        self._holders.append((part, lambda: () if (alive := found()) is None else tensors(alive)))

    def peaks(self) -> dict[str, dict[str, int]]:
        """Bytes by stage and kind, in the order in which the stages began; last, what lay between them."""
        self._count()
        stages = [name for name in self._peaks if name != ELSEWHERE]
        return {name: dict(self._peaks[name]) for name in (*stages, ELSEWHERE) if self._peaks.get(name)}

    def note(self, error: BaseException) -> None:
        """Keep what is held now that memory does not suffice; of several times the first counts."""
        if self.shortage:
            return
        self._count()
        stage = self._open[-1]
        on_host = self.device.type == "cpu" or isinstance(error, MemoryError) or bool(_HOST.search(str(error)))
        place = torch.device("cpu") if on_host else self.device
        held: dict[str, int] = {}
        seen: set[int] = set()
        for part, tensors in self._holders:
            held[part] = held.get(part, 0) + _bytes_on(place, tensors(), seen)
        total = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else None
        peak = self._peaks.get(stage, {}).get(RESIDENT if on_host else ALLOCATED)
        self.shortage = Shortage(stage if stage != ELSEWHERE else "", on_host, peak, total, held)

    def _count(self) -> None:
        """What was reached since the last look belongs to the innermost stage."""
        known = self._peaks.setdefault(self._open[-1], {})
        for meter in self._meters:
            for kind, size in meter.peaks().items():
                known[kind] = max(known.get(kind, 0), size)
            meter.reset()


def made_of(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that have its memory: itself, or those inside of what optimizers keep in 8 bits."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from made_of(getattr(tensor, name))


def _bytes_on(place: torch.device, tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of storages that were not seen yet."""
    size = 0
    for tensor in chain.from_iterable(map(made_of, tensors)):
        if tensor.device.type != place.type:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size += storage.nbytes()
    return size


@contextmanager
def shortage_told(memory: StageMemory, advice: Callable[[Shortage], str]) -> Iterator[None]:
    """Do a program's work in here: where memory does not suffice for it, that is said once and in one way.

    Args:
        memory: of the program.
        advice: what to do, in a sentence without its end.

    Raises:
        LackOfMemoryError: memory does not suffice; with the stage, what is held by part, and the advice.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_of_memory(error):
            raise
        memory.note(error)
        shortage = memory.shortage
        assert shortage is not None
        told = [str(shortage), advice(shortage), "" if shortage.on_host else allocator_advice()]
        raise LackOfMemoryError(lack_of_memory(error, shortage.stage, [one for one in told if one])) from error


def has_expandable_segments() -> bool:
    """Whether torch's allocator was told to grow its segments, which leaves fewer gaps that nothing fits into."""
    return any("expandable_segments:true" in os.environ.get(name, "").lower() for name in _ALLOCATOR)


def allocator_advice() -> str:
    """What to set for that, as a sentence without its end; empty if it is set."""
    if has_expandable_segments():
        return ""
    return f"If little is lacking, {_ALLOCATOR[1]}={_SEGMENTS} in the environment may free it, at no cost"


def in_gib(peaks: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """Bytes by stage and kind as GiB."""
    return {stage: {kind: round(size / GIB, 3) for kind, size in kinds.items()} for stage, kinds in peaks.items()}


def in_words(peaks: dict[str, dict[str, int]]) -> str:
    """The peaks in a line; empty if nothing was counted."""
    kind = ALLOCATED if any(ALLOCATED in kinds for kinds in peaks.values()) else RESIDENT
    told = [f"{stage} {_gib(kinds[kind])}" for stage, kinds in peaks.items() if kind in kinds]
    where = ("on the GPU", "") if kind == ALLOCATED else ("of this process", ", where more than before")
    return f"memory {where[0]} at most, in GiB{where[1]}: {', '.join(told)}" if told else ""


def _gib(size: Any) -> str:
    return f"{size / GIB:.2f}"
