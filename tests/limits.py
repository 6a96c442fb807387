"""Limits of the system, for tests of what happens when it refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest


@contextmanager
def _limit(kind: str, size: int) -> Iterator[None]:
    """This process has another soft limit, by the name that the module ``resource`` has for it."""
    resource = pytest.importorskip("resource")
    number = getattr(resource, kind)
    before = resource.getrlimit(number)
    resource.setrlimit(number, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(number, before)


def file_size_limit(size: int) -> AbstractContextManager[None]:
    """No file of this process may grow beyond ``size`` bytes: with 0 every write fails, by whatever library."""
    return _limit("RLIMIT_FSIZE", size)


def memory_limit(size: int) -> AbstractContextManager[None]:
    """This process may have ``size`` more bytes of address space, where the system can say so: more is MemoryError."""
    if sys.platform != "linux":
        return nullcontext()
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - in every single case of a fuzz test
        now = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return _limit("RLIMIT_AS", now + size)


def open_files_limit(more: int) -> AbstractContextManager[None]:
    """This process may open ``more`` files than it has open."""
    return _limit("RLIMIT_NOFILE", len(list(Path("/proc/self/fd").iterdir())) + more)


def peak_memory(work: Callable[[bytes], None], data: bytes) -> int:
    """Bytes by which a process grows at most, in a fresh fork of this one, while it does ``work`` on ``data``."""
    resource = pytest.importorskip("resource")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            before = _resident()
            work(data)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            os.write(writing, str(max(peak - before, 0)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    assert result, "the work failed"
    return int(result)


def _resident() -> int:
    resource = pytest.importorskip("resource")
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
