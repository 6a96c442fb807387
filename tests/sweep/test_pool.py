"""Processes that make runs: order, head start, deaths, ends. The processes here train nothing."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dreamlora.cli import parse
from dreamlora.errors import WriteError
from dreamlora.sweep import pool
from dreamlora.sweep.plan import Job
from dreamlora.sweep.pool import Ended, Pool
from dreamlora.sweep.seats import Seat

FAKE = """
    import json, os, sys, time
    from pathlib import Path
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "began").write_text(str(time.time()), encoding="utf-8")
        rank = os.environ.get("RANK", "")
        (folder / f"who{rank}").write_text(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}", encoding="utf-8")
        launched = " ".join(os.environ.get(n, "") for n in ("WORLD_SIZE", "MASTER_PORT"))
        (folder / f"launched{rank}").write_text(launched, encoding="utf-8")
        while rank and not (folder / f"launched{1 - int(rank)}").exists():
            time.sleep(0.01)
        if "die second" in job["argv"] and rank == "0":
            time.sleep(60)
        if "die" in job["argv"] or "die second" in job["argv"] or os.environ.get("BROKEN"):
            os._exit(9)
        if "leave" in job["argv"]:
            os.close(0), os.close(1), time.sleep(60)
        answer = next((word[7:] for word in job["argv"] if word.startswith("answer ")), "")
        if answer:
            sys.stdout.buffer.write(answer.encode("latin-1").replace(b"|", b"\\n"))
            sys.stdout.flush()
            if not answer.endswith("|"):
                os._exit(9)
            continue
        if "hang" in job["argv"]:
            time.sleep(60)
        if "slow" in job["argv"]:
            time.sleep(0.3)
            (folder / "metrics.jsonl").write_text("{}", encoding="utf-8")
            time.sleep(0.4)
        status = "diverged" if "diverge" in job["argv"] else "finished"
        (folder / "ended").write_text(str(time.time()), encoding="utf-8")
        print(json.dumps({"status": status, "message": ""}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    file = tmp_path / "worker.py"
    file.write_text(textwrap.dedent(FAKE), encoding="utf-8")
    return [sys.executable, "-S", str(file)]


def jobs_of(tmp_path: Path, *kinds: str) -> list[Job]:
    return [
        Job("dreambooth", "adamw", "0.001", seed, (kind,), tmp_path / f"run{seed}") for seed, kind in enumerate(kinds)
    ]


def made(jobs: list[Job], seats: list[Seat], tmp_path: Path, worker: list[str]) -> dict[int, Ended]:
    """All that is told of the jobs, at most 30 seconds later."""
    ended: list[Ended] = []
    errors: list[WriteError] = []

    def run() -> None:
        try:
            running.run(jobs, ended.append)
        except WriteError as error:
            errors.append(error)

    with Pool(seats, tmp_path / "logs", worker) as running:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive(), "the program waits for ever"
    if errors:
        raise errors[0]
    assert len(ended) == len(jobs)
    return {one.job.seed: one for one in ended}


def when(job: Job, what: str) -> float:
    return float((job.folder / what).read_text(encoding="utf-8"))


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
        return len({(job.folder / "who").read_text(encoding="utf-8") for job in jobs})

    assert processes(Seat(), "many") == 1
    assert processes(Seat(runs_per_process=1), "one") == 3


def test_a_death_is_recorded_and_the_others_go_on(tmp_path: Path, worker: list[str]) -> None:
    jobs = jobs_of(tmp_path, "", "die", "")
    ended = made(jobs, [Seat()], tmp_path, worker)
    assert [ended[seed].status for seed in range(3)] == ["finished", "failed", "finished"]
    assert "status 9" in ended[1].message and "worker-0.log" in ended[1].message
    assert json.loads((jobs[1].folder / "outcome.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert not jobs[1].done


ANSWERS = {
    "cut": 'answer {"status": "fin',
    "cut, with its end": 'answer {"status": "fin|',
    "no JSON": "answer hello|",
    "no object": "answer [1]|",
    "no keys": "answer {}|",
    "no message": 'answer {"status": "finished"}|',
    "another status": 'answer {"status": "fine", "message": ""}|',
    "no text": "answer \xff\xfe|",
    "none, but alive": "leave",
}


@pytest.mark.parametrize("kind", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_none_is_a_failure_and_the_others_go_on(
    kind: str, tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.2)
    jobs = jobs_of(tmp_path, "", kind, "")
    ended = made(jobs, [Seat()], tmp_path, worker)
    assert [ended[seed].status for seed in range(3)] == ["finished", "failed", "finished"]
    assert "worker-0.log" in ended[1].message
    assert json.loads((jobs[1].folder / "outcome.json").read_text(encoding="utf-8"))["message"] == ended[1].message


@pytest.mark.parametrize("places", [1, 3])
def test_if_no_process_can_be_started_every_run_says_why(places: int, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "", "", "", "")
    ended = made(jobs, [Seat()] * places, tmp_path, [str(tmp_path / "no-such-program")])
    assert {one.status for one in ended.values()} == {"failed"}
    assert all("could not be started" in one.message and "no-such-program" in one.message for one in ended.values())
    assert all((job.folder / "outcome.json").exists() for job in jobs)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_seat_that_cannot_start_leaves_the_runs_to_the_others(
    broken: int, tmp_path: Path, worker: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its log cannot be opened: a folder lies there."""
    (tmp_path / "logs" / f"worker-{broken}.log").mkdir(parents=True)
    ended = made(jobs_of(tmp_path, *[""] * 5), [Seat(), Seat()], tmp_path, worker)
    assert {one.status for one in ended.values()} == {"finished"}
    (text,) = caplog.messages
    assert f"worker-{broken}.log" in text and "the other workers make what is left" in text


def test_a_seat_whose_processes_die_does_not_swallow_all_runs(tmp_path: Path, worker: list[str]) -> None:
    seats = [Seat({"BROKEN": "1"}), Seat()]
    ended = made(jobs_of(tmp_path, *["slow"] * 9), seats, tmp_path, worker)
    assert sum(one.status == "failed" for one in ended.values()) <= pool._DEATHS


def test_the_last_seat_never_gives_up(tmp_path: Path, worker: list[str]) -> None:
    ended = made(jobs_of(tmp_path, *["die"] * 5, ""), [Seat(), Seat()], tmp_path, worker)
    assert [ended[seed].status for seed in range(6)] == ["failed"] * 5 + ["finished"]


def test_a_second_process_that_cannot_be_started_ends_the_first(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = subprocess.Popen, []

    def start(*args: Any, **options: Any) -> Any:
        if options["env"]["RANK"] == "1":
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(real(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    ended = made(jobs_of(tmp_path, ""), [Seat(processes=2)], tmp_path, worker)
    assert ended[0].status == "failed" and "Resource temporarily unavailable" in ended[0].message
    assert started and all(process.poll() is not None for process in started)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_whatever_is_raised_in_a_thread_ends_one_run_alone(
    error: Exception, tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool._Worker.make

    def make(self: Any, job: Job) -> Ended:
        if job.seed == 1:
            raise error
        return real(self, job)

    monkeypatch.setattr(pool._Worker, "make", make)
    ended = made(jobs_of(tmp_path, "", "", ""), [Seat(), Seat()], tmp_path, worker)
    assert [ended[seed].status for seed in range(3)] == ["finished", "failed", "finished"]
    assert type(error).__name__ in ended[1].message and str(error) in ended[1].message


def full(*_: object, **__: object) -> None:
    raise WriteError.of(Path("outcome.json"), OSError(errno.ENOSPC, "No space left on device"))


def test_a_full_disk_ends_the_program_with_its_own_message(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool, "write_outcome", full)
    jobs = jobs_of(tmp_path, "die", "", "")
    assert parse.run(lambda _: made(jobs, [Seat(), Seat()], tmp_path, worker), []) == 1
    assert "error: cannot write outcome.json: the disk is full." in capsys.readouterr().err


def test_a_full_disk_before_the_first_start_ends_the_program_too(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool._Worker, "_start", full)
    with pytest.raises(WriteError, match="the disk is full"):
        made(jobs_of(tmp_path, "", ""), [Seat(), Seat()], tmp_path, worker)


def test_an_outcome_that_cannot_be_written_is_told_with_the_run(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise WriteError.of(Path("outcome.json"), PermissionError(errno.EACCES, "Permission denied"))

    monkeypatch.setattr(pool, "write_outcome", refuse)
    ended = made(jobs_of(tmp_path, "die", ""), [Seat()], tmp_path, worker)
    assert ended[0].status == "failed" and "status 9" in ended[0].message and "Permission denied" in ended[0].message
    assert ended[1].status == "finished"


def test_the_head_start_goes_to_the_next_run_if_the_first_fails(tmp_path: Path, worker: list[str]) -> None:
    """Else the others would fill the caches all at once."""
    jobs = jobs_of(tmp_path, "die", "slow", "", "")
    made(jobs, [Seat(), Seat(), Seat()], tmp_path, worker)
    trains = when(jobs[1], "began") + 0.3
    assert all(when(job, "began") >= trains for job in jobs[2:])


def test_a_run_whose_progress_cannot_be_seen_stops_no_others(
    tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat

    def stat(self: Path, **options: Any) -> Any:
        if self.name == "metrics.jsonl":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    ended = made(jobs_of(tmp_path, "slow", "", ""), [Seat(), Seat()], tmp_path, worker)
    assert {one.status for one in ended.values()} == {"finished"}


def test_processes_that_share_a_run_know_each_other_and_end_together(tmp_path: Path, worker: list[str]) -> None:
    jobs = jobs_of(tmp_path, "", "die second", "")
    began = time.monotonic()
    ended = made(jobs, [Seat(runs_per_process=1, processes=2)], tmp_path, worker)
    assert [ended[seed].status for seed in range(3)] == ["finished", "failed", "finished"]
    assert time.monotonic() - began < 30, "the first one does not wait for the second for ever"
    launched = [(job.folder / f"launched{rank}").read_text(encoding="utf-8") for job in jobs for rank in (0, 1)]
    assert {text.split()[0] for text in launched} == {"2"} and launched[0] == launched[1]
    people = [(job.folder / f"who{rank}").read_text(encoding="utf-8").split()[0] for job in jobs for rank in (0, 1)]
    assert len(set(people)) == 6 and not any(Path(f"/proc/{person}").exists() for person in people)


def test_leaving_ends_the_processes_and_records_nothing(tmp_path: Path, worker: list[str]) -> None:
    jobs = jobs_of(tmp_path, "hang", "")
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Pool([Seat()], tmp_path / "logs", worker) as running:
        threading.Thread(target=running.run, args=(jobs, print), daemon=True).start()
        who = jobs[0].folder / "who"
        while not (who.exists() and who.read_text(encoding="utf-8")):
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 10
    process = int(who.read_text(encoding="utf-8").split()[0])
    assert not Path(f"/proc/{process}").exists()
    time.sleep(0.1)
    assert not (jobs[0].folder / "outcome.json").exists() and not jobs[1].folder.exists()


def test_a_worker_ends_with_its_input() -> None:
    """Whoever started it was killed: it must not go on training."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamlora.sweep.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_worker_ends_with_an_order_that_it_cannot_read() -> None:
    """Whoever gave it waits for an answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamlora.sweep.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert process.stdin is not None
    process.stdin.write(b'{"program": "dream\n')
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()
