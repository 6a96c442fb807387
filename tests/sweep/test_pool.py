"""Processes that make runs: order, head start, deaths, ends. The processes here train nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dreamlora.errors import UserError
from dreamlora.sweep import pool
from dreamlora.sweep.plan import Job
from dreamlora.sweep.pool import Ended, Pool, Seat

FAKE = """
    import json, os, sys, time
    from pathlib import Path
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "began").write_text(str(time.time()))
        rank = os.environ.get("RANK", "")
        (folder / f"who{rank}").write_text(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        (folder / f"launched{rank}").write_text(" ".join(os.environ.get(n, "") for n in ("WORLD_SIZE", "MASTER_PORT")))
        while rank == "0" and not (folder / "launched1").exists():
            time.sleep(0.01)
        if "die second" in job["argv"] and rank == "0":
            time.sleep(60)
        if "die" in job["argv"] or "die second" in job["argv"]:
            os._exit(9)
        if "hang" in job["argv"]:
            time.sleep(60)
        if "slow" in job["argv"]:
            time.sleep(0.3)
            (folder / "metrics.jsonl").write_text("{}")
            time.sleep(0.4)
        status = "diverged" if "diverge" in job["argv"] else "finished"
        (folder / "ended").write_text(str(time.time()))
        print(json.dumps({"status": status, "message": ""}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    file = tmp_path / "worker.py"
    file.write_text(textwrap.dedent(FAKE))
    return [sys.executable, "-S", str(file)]


def jobs_of(tmp_path: Path, *kinds: str) -> list[Job]:
    return [Job("dreambooth", "adamw", 1e-3, seed, (kind,), tmp_path / f"run{seed}") for seed, kind in enumerate(kinds)]


def made(jobs: list[Job], seats: list[Seat], tmp_path: Path, worker: list[str]) -> dict[int, Ended]:
    ended: list[Ended] = []
    with Pool(seats, tmp_path / "logs", worker) as running:
        running.run(jobs, ended.append)
    return {one.job.seed: one for one in ended}


def when(job: Job, what: str) -> float:
    return float((job.folder / what).read_text())


def test_every_run_is_made_once(tmp_path: Path, worker: list[str]) -> None:
    jobs = jobs_of(tmp_path, "", "diverge", "", "", "")
    ended = made(jobs, [Seat(), Seat()], tmp_path, worker)
    assert {seed: one.status for seed, one in ended.items()} == {0: "finished", 1: "diverged", 2: "finished"} | {
        3: "finished",
        4: "finished",
    }


def test_the_first_run_has_a_head_start_until_it_trains(tmp_path: Path, worker: list[str]) -> None:
    first, second = jobs = jobs_of(tmp_path, "slow", "")
    made(jobs, [Seat(), Seat()], tmp_path, worker)
    assert when(first, "began") + 0.3 <= when(second, "began") <= when(first, "ended") + 0.1


def test_a_process_serves_many_runs_unless_told_otherwise(tmp_path: Path, worker: list[str]) -> None:
    def processes(seat: Seat, name: str) -> int:
        jobs = jobs_of(tmp_path / name, "", "", "")
        made(jobs, [seat], tmp_path, worker)
        return len({(job.folder / "who").read_text() for job in jobs})

    assert processes(Seat(), "many") == 1
    assert processes(Seat(runs_per_process=1), "one") == 3


def test_a_death_is_recorded_and_the_others_go_on(tmp_path: Path, worker: list[str]) -> None:
    jobs = jobs_of(tmp_path, "", "die", "")
    ended = made(jobs, [Seat()], tmp_path, worker)
    assert [ended[seed].status for seed in range(3)] == ["finished", "failed", "finished"]
    assert "status 9" in ended[1].message and "worker-0.log" in ended[1].message
    assert json.loads((jobs[1].folder / "outcome.json").read_text())["status"] == "failed"
    assert not jobs[1].done


def test_processes_that_share_a_run_know_each_other_and_end_together(tmp_path: Path, worker: list[str]) -> None:
    jobs = jobs_of(tmp_path, "", "die second", "")
    began = time.monotonic()
    ended = made(jobs, [Seat(runs_per_process=1, processes=2)], tmp_path, worker)
    assert [ended[seed].status for seed in range(3)] == ["finished", "failed", "finished"]
    assert time.monotonic() - began < 30, "the first one does not wait for the second for ever"
    launched = [(job.folder / f"launched{rank}").read_text() for job in jobs for rank in (0, 1)]
    assert {text.split()[0] for text in launched} == {"2"} and launched[0] == launched[1]
    people = [(job.folder / f"who{rank}").read_text().split()[0] for job in jobs for rank in (0, 1)]
    assert len(set(people)) == 6 and not any(Path(f"/proc/{person}").exists() for person in people)


def test_leaving_ends_the_processes_and_records_nothing(tmp_path: Path, worker: list[str]) -> None:
    jobs = jobs_of(tmp_path, "hang", "")
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Pool([Seat()], tmp_path / "logs", worker) as running:
        threading.Thread(target=running.run, args=(jobs, print), daemon=True).start()
        while not (jobs[0].folder / "who").exists():
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 10
    process = int((jobs[0].folder / "who").read_text().split()[0])
    assert not Path(f"/proc/{process}").exists()
    time.sleep(0.1)
    assert not (jobs[0].folder / "outcome.json").exists() and not jobs[1].folder.exists()


def test_a_worker_ends_with_its_input() -> None:
    """Whoever started it was killed: it must not go on training."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamlora.sweep.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_gpus_get_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    assert pool.seats(None, embedded=True) == [
        Seat({"CUDA_VISIBLE_DEVICES": "3"}, 1),
        Seat({"CUDA_VISIBLE_DEVICES": "GPU-5a"}, 1),
    ]
    assert len(pool.seats(3, embedded=False)) == 3
    assert pool.seats(None, embedded=True, processes=2) == [Seat({"CUDA_VISIBLE_DEVICES": "3,GPU-5a"}, 1, 2)]
    with pytest.raises(UserError, match="--processes_per_run 3: each needs a GPU of its own, and there are 2"):
        pool.seats(None, embedded=True, processes=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert [seat.environment["CUDA_VISIBLE_DEVICES"] for seat in pool.seats(None, False, 2)] == ["0,1", "2,3"]


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert [seat.environment["OMP_NUM_THREADS"] for seat in pool.seats(None, embedded=True)] == ["1"] * 8
    assert [seat.environment["OMP_NUM_THREADS"] for seat in pool.seats(None, embedded=False)] == ["8"]
    assert [seat.environment["OMP_NUM_THREADS"] for seat in pool.seats(2, embedded=False)] == ["4", "4"]
    shared = pool.seats(None, embedded=True, processes=4)
    assert len(shared) == 2 and shared[0].environment["OMP_NUM_THREADS"] == "1" and shared[0].processes == 4
    assert shared[0].environment["ACCELERATE_USE_CPU"] == "true"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [seat.environment["OMP_NUM_THREADS"] for seat in pool.seats(None, embedded=False)] == ["2"]
