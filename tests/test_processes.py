"""Processes meet in torch's store; threads stand in for them here. Real ones: tests/training/test_processes.py."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed
from torch.distributed import distributed_c10d

from dreamlora.processes import gather_lists, tell_everyone, wait_for_everyone


def test_one_process_waits_for_nobody() -> None:
    wait_for_everyone()
    assert tell_everyone("mine") == "mine" and gather_lists([1, 2]) == [1, 2]


def test_nobody_goes_on_before_all_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    world, meetings = 3, 20
    store, come, lock = distributed.HashStore(), [0] * meetings, threading.Lock()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)

    def process(rank: int) -> list[int]:
        seen = []
        for meeting in range(meetings):
            time.sleep(0.002 * ((rank + meeting) % world))
            with lock:
                come[meeting] += 1
            wait_for_everyone()
            seen.append(come[meeting])
        return seen

    with ThreadPoolExecutor(world) as pool:
        assert list(pool.map(process, range(world))) == [[world] * meetings] * world


def test_the_wait_is_longer_than_a_collective_s_and_python_heeds_signals_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited = []

    class Store:
        def add(self, key: str, amount: int) -> int:
            return 1

        def wait(self, keys: list[str], timeout: object) -> None:
            waited.append(timeout)
            if len(waited) < 1000:
                raise distributed.DistStoreError("wait timeout")

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", Store)
    wait_for_everyone()
    assert sum(waited, timedelta()) > distributed_c10d.default_pg_timeout / 2 and max(waited) <= timedelta(seconds=1)
    assert timedelta(days=1) > 10 * distributed_c10d.default_pg_timeout
