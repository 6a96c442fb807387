"""Runs are spread over processes: one per GPU, or several on the CPU. No torch in this process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from dreamlora.runfolder import RunFolder
from dreamlora.sweep.plan import Job
from dreamlora.sweep.worker import write_outcome

WORKER = (sys.executable, "-m", "dreamlora.sweep.worker")
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Seat:
    """A place for one process.

    Attributes:
        environment: which GPU, or how many threads.
        runs_per_process: 0: any number; 1: every run gets a fresh process, so that no GPU memory is left behind.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    runs_per_process: int = 0


@dataclass(frozen=True)
class Ended:
    """A run that is over.

    Attributes:
        status: "finished", "diverged" or "failed".
    """

    job: Job
    status: str
    message: str
    seconds: float


def seats(workers: int | None, embedded: bool) -> list[Seat]:
    """Where runs can go: the GPUs, else the cores.

    Args:
        workers: how many are wanted; None: one per GPU; without one, one per core for the embedded model, else one.
            The cores are shared out as threads, unless OMP_NUM_THREADS says how many a process gets.
        embedded: whether the embedded model is trained, of which several copies fit into any memory.
    """
    gpus = visible_gpus()
    if gpus:
        count = workers or len(gpus)
        return [Seat({"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]}, runs_per_process=1) for k in range(count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or (cores if embedded else 1)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    return [Seat({"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})] * count


def visible_gpus() -> list[str]:
    """Their ids as CUDA_VISIBLE_DEVICES takes them; asked of the driver, as torch would take seconds to load."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [one for one in told.split(",") if one.strip() not in ("", "-1")]
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not shutil.which("nvidia-smi"):
        return []
    asked = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(k) for k, _ in enumerate(line for line in asked.stdout.splitlines() if line.startswith("GPU "))]


class Pool:
    """Processes that make runs; as a context manager it ends them, also after Ctrl-C.

    Args:
        places: one per process.
        logs: folder for what the processes say, ``worker-0.log`` and so on.
        command: of a process; see ``worker``.
    """

    def __init__(self, places: Sequence[Seat], logs: Path, command: Sequence[str] = WORKER) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._workers = [_Worker(seat, logs / f"worker-{k}.log", command) for k, seat in enumerate(places)]
        self._closed = threading.Event()
        self._warm = threading.Event()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._warm.set()
        for worker in self._workers:
            worker.stop()

    def run(self, jobs: Sequence[Job], on_end: Callable[[Ended], None]) -> None:
        """Make all runs; ``on_end`` is called in this thread, after each.

        The very first run gets a head start until it trains: it fills the caches that all runs share (encoded images,
        class images). Two processes that encode the same images in other batches would round them differently, and
        their runs could then not be compared.
        """
        waiting, ended = deque(jobs), queue.Queue[Ended]()
        for number, worker in enumerate(self._workers[: len(jobs)]):
            first = number == 0 and not self._warm.is_set()
            threading.Thread(target=self._serve, args=(worker, waiting, ended, first), daemon=True).start()
        for _ in jobs:
            on_end(_next(ended))

    def _serve(self, worker: _Worker, waiting: deque[Job], ended: queue.Queue[Ended], first: bool) -> None:
        worker.start()  # its imports overlap with the head start
        if not first:
            self._warm.wait()
        while not self._closed.is_set():
            try:
                job = waiting.popleft()
            except IndexError:
                return
            if first:
                threading.Thread(target=self._watch, args=(job,), daemon=True).start()
                first = False
            result = worker.make(job)
            self._warm.set()
            if self._closed.is_set():
                return  # stopped by us: the run is neither finished nor failed
            if result.status == "failed":  # a process that died could not write it down
                write_outcome(RunFolder(job.folder), job.method, result.status, result.message)
            ended.put(result)

    def _watch(self, job: Job) -> None:
        """Let the others begin once this run has measured the base model: all caches are filled then."""
        before = time.time()
        file = RunFolder(job.folder).metrics_file
        while not self._warm.wait(_POLL_SECONDS):
            if file.exists() and file.stat().st_mtime > before:
                self._warm.set()


class _Worker:
    """One process at a time on one seat; a process that dies is replaced."""

    def __init__(self, seat: Seat, log: Path, command: Sequence[str]) -> None:
        self._seat = seat
        self._log = log
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._made = 0

    def start(self) -> subprocess.Popen[str]:
        """The process, started if there is none."""
        if self._process is None or self._process.poll() is not None:
            environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**environment, **self._seat.environment},
                    start_new_session=True,  # Ctrl-C is for the program that knows what was finished
                )
            self._made = 0
        return self._process

    def make(self, job: Job) -> Ended:
        """Make a run and wait for its end; a process that dies meanwhile has failed at it."""
        began = time.monotonic()
        process = self.start()
        order = {"program": job.program, "argv": list(job.argv), "folder": str(job.folder), "method": job.method}
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).write(json.dumps(order) + "\n")
            _pipe(process.stdin).flush()
            answer = _pipe(process.stdout).readline()
        if answer:
            outcome = json.loads(answer)
        else:
            told = f"its process ended with status {process.wait()}; see {self._log}"
            outcome = {"status": "failed", "message": told}
        self._made += 1
        if self._made == self._seat.runs_per_process:
            self.stop()
        return Ended(job, outcome["status"], outcome["message"], time.monotonic() - began)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._process = None


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("a worker was started without pipes")
    return stream


def _next(ended: queue.Queue[Ended]) -> Ended:
    """Wait in short pieces: a wait without end would not notice Ctrl-C on every system."""
    while True:
        try:
            return ended.get(timeout=1)
        except queue.Empty:
            continue
