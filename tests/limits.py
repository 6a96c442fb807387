"""Limits of the system, for tests of what happens when it refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes: with 0 every write fails, by whatever library."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """This process may have ``size`` more bytes of address space, where the system can say so: more is MemoryError."""
    if sys.platform != "linux":
        yield
        return
    resource = pytest.importorskip("resource")
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123
        now = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def open_files_limit(more: int) -> Iterator[None]:
    """This process may open ``more`` files than it has open."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


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
