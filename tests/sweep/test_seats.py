"""Which GPUs or cores each process gets."""

from __future__ import annotations

import pytest

from dreamlora.errors import UserError
from dreamlora.sweep import seats
from dreamlora.sweep.seats import Seat


def test_gpus_get_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    assert seats.seats(None, embedded=True) == [
        Seat({"CUDA_VISIBLE_DEVICES": "3"}, 1),
        Seat({"CUDA_VISIBLE_DEVICES": "GPU-5a"}, 1),
    ]
    assert len(seats.seats(3, embedded=False)) == 3
    assert seats.seats(None, embedded=True, processes=2) == [Seat({"CUDA_VISIBLE_DEVICES": "3,GPU-5a"}, 1, 2)]
    with pytest.raises(UserError, match="--processes_per_run 3: each needs a GPU of its own, and there are 2"):
        seats.seats(None, embedded=True, processes=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert [seat.environment["CUDA_VISIBLE_DEVICES"] for seat in seats.seats(None, False, 2)] == ["0,1", "2,3"]


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert [seat.environment["OMP_NUM_THREADS"] for seat in seats.seats(None, embedded=True)] == ["1"] * 8
    assert [seat.environment["OMP_NUM_THREADS"] for seat in seats.seats(None, embedded=False)] == ["8"]
    assert [seat.environment["OMP_NUM_THREADS"] for seat in seats.seats(2, embedded=False)] == ["4", "4"]
    shared = seats.seats(None, embedded=True, processes=4)
    assert len(shared) == 2 and shared[0].environment["OMP_NUM_THREADS"] == "1" and shared[0].processes == 4
    assert shared[0].environment["ACCELERATE_USE_CPU"] == "true"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [seat.environment["OMP_NUM_THREADS"] for seat in seats.seats(None, embedded=False)] == ["2"]
