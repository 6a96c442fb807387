"""The processes of a run wait for each other and tell each other values, however long one of them works alone.

A collective of NCCL is given up after 10 minutes, and while it lasts the GPU is busy with waiting. So the processes
first meet in the store that torch's process group was founded with, which is memory on one machine and patient; only
then do they begin a collective, which none of them has to wait in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed
from torch.distributed import distributed_c10d

PATIENCE = timedelta(days=1)
"""Nobody waits so long for a process that has died: the launcher ends the others, or the store ends with its owner."""

SLICE = timedelta(seconds=1)
"""Python heeds no signal while it waits in the store, so it waits in short pieces."""

T = TypeVar("T")


def wait_for_everyone() -> None:
    """Go on when all processes have come here, as often as this one.

    Wanted wherever a process may have worked longer than the others before a collective of tensors.
    """
    if not distributed.is_initialized():
        return
    store, world = distributed_c10d._get_default_store(), distributed.get_world_size()
    # Arrivals are counted over the whole run: nobody comes to the next meeting before all have come to this one.
    arrival = store.add("dreamlora/arrivals", 1)
    everyone = f"dreamlora/everyone/{(arrival - 1) // world}"
    if arrival % world == 0:
        store.set(everyone, "here")
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            return store.wait([everyone], SLICE)
        except distributed.DistStoreError:
            if time.monotonic() > deadline:
                raise


@contextmanager
def main_first() -> Iterator[None]:
    """A block that the main process goes through before the others begin, which find on disk what it left there.

    An error in it lets the others begin too: they meet it themselves.
    """
    main = not distributed.is_initialized() or distributed.get_rank() == 0
    if not main:
        wait_for_everyone()
    try:
        yield
    finally:
        if main:
            wait_for_everyone()


def tell_everyone(value: T) -> T:
    """The main process's value, in every process; what the others give is not looked at."""
    if not distributed.is_initialized():
        return value
    wait_for_everyone()
    main_value: T = broadcast_object_list([value])[0]
    return main_value


def gather_lists(part: list[Any]) -> list[Any]:
    """The lists of all processes as one list, by rank, in every process."""
    if not distributed.is_initialized():
        return part
    wait_for_everyone()
    whole: list[Any] = gather_object(part)
    return whole
