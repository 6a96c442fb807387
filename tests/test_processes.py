"""Processes meet in torch's store; threads stand in for them here. Real ones: tests/training/test_processes.py."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed
from torch.distributed import distributed_c10d

from dreamlora import processes
from dreamlora.errors import UserError
from dreamlora.processes import gather_lists, main_first, tell_everyone, wait_for_everyone


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


@pytest.mark.parametrize("fails", [False, True])
def test_the_main_process_goes_first(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """An error in the main process, which it may survive, leaves nobody waiting for ever."""
    world, store, ranks = 3, distributed.HashStore(), threading.local()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(distributed, "get_rank", lambda: ranks.own)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=10))
    passed: list[int] = []

    def process(rank: int) -> None:
        ranks.own = rank
        for _ in range(5):
            with contextlib.suppress(UserError), main_first():
                time.sleep(0.01 * (rank == 0))
                passed.append(rank)
                if fails:
                    raise UserError("a broken image")
            wait_for_everyone()

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(process, range(world)))
    assert [sorted(passed[n : n + world]) for n in range(0, 15, world)] == [[0, 1, 2]] * 5
    assert passed[::world] == [0] * 5
