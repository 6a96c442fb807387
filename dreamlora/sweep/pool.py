"""Runs are spread over processes: one per GPU, or several on the CPU, or several that share a run. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from dreamlora.sweep.gpus import MIG, visible_gpus
from dreamlora.sweep.plan import Job
from dreamlora.sweep.worker import write_outcome

WORKER = (sys.executable, "-m", "dreamlora.sweep.worker")
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Seat:
    """A place for one run at a time.

    Attributes:
        environment: which GPUs, or how many threads.
        runs_per_process: 0: any number; 1: every run gets fresh processes, so that no GPU memory is left behind.
        processes: that share a run.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    runs_per_process: int = 0
    processes: int = 1


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


def seats(workers: int | None, embedded: bool, processes: int = 1) -> list[Seat]:
    """Where runs can go: the GPUs, else the cores.

    Args:
        workers: how many are wanted; None: as many as there are GPUs for; without one, one per core for the embedded
            model, else one. The cores are shared out as threads, unless OMP_NUM_THREADS says how many a process gets.
        embedded: whether the embedded model is trained, of which several copies fit into any memory.
        processes: that share a run.

    Raises:
        UserError: there are fewer GPUs than processes that share a run, or they are MIG instances.
    """
    gpus = visible_gpus()
    if processes > 1 and any(one.startswith(MIG) for one in gpus):
        raise UserError(
            f"--processes_per_run {processes}: the GPU is divided (MIG), a process sees one MIG instance only, and "
            "instances cannot work together: leave it out, so that each instance makes runs of its own"
        )
    if gpus and processes > len(gpus):
        raise UserError(f"--processes_per_run {processes}: each needs a GPU of its own, and there are {len(gpus)}")
    if gpus:
        groups = [gpus[start : start + processes] for start in range(0, len(gpus) - processes + 1, processes)]
        chosen = [groups[k % len(groups)] for k in range(workers or len(groups))]
        return [Seat({"CUDA_VISIBLE_DEVICES": ",".join(ids)}, 1, processes) for ids in chosen]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or (max(1, cores // processes) if embedded else 1)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (count * processes)))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if processes == 1:
        return [Seat(environment)] * count
    return [Seat({**environment, "ACCELERATE_USE_CPU": "true"}, 1, processes)] * count


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
    """The processes of one seat; those that die, or have made their runs, are replaced."""

    def __init__(self, seat: Seat, log: Path, command: Sequence[str]) -> None:
        self._seat = seat
        self._log = log
        self._command = command
        self._processes: list[subprocess.Popen[str]] = []
        self._made = 0

    def start(self) -> list[subprocess.Popen[str]]:
        """The processes, the first one first; started if there are none."""
        if not self._processes or self._processes[0].poll() is not None:
            self.stop()
            port = _free_port()
            self._processes = [self._start(rank, port) for rank in range(self._seat.processes)]
            if self._seat.processes > 1:
                for process in self._processes:
                    threading.Thread(target=_end_together, args=(process, self._processes), daemon=True).start()
            self._made = 0
        return self._processes

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        if self._seat.processes > 1:  # what accelerate launch would set
            places = (rank, rank, self._seat.processes, "127.0.0.1", port)
            environment |= dict(zip(_LAUNCHER, map(str, places), strict=True))
        with self._log.open("a") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**environment, **self._seat.environment},
                start_new_session=True,  # Ctrl-C is for the program that knows what was finished
            )

    def make(self, job: Job) -> Ended:
        """Make a run and wait for its end; a process that dies meanwhile has failed at it."""
        began = time.monotonic()
        processes = self.start()
        order = {"program": job.program, "argv": list(job.argv), "folder": str(job.folder), "method": job.method}
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            for process in processes:
                _pipe(process.stdin).write(json.dumps(order) + "\n")
                _pipe(process.stdin).flush()
            answer = _pipe(processes[0].stdout).readline()
        if answer:
            outcome = json.loads(answer)
        else:
            told = f"its process ended with status {processes[0].wait()}; see {self._log}"
            outcome = {"status": "failed", "message": told}
        self._made += 1
        if self._made == self._seat.runs_per_process:
            self.stop()
        return Ended(job, outcome["status"], outcome["message"], time.monotonic() - began)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        self._processes = []


def _end_together(process: subprocess.Popen[str], together: Sequence[subprocess.Popen[str]]) -> None:
    """When one of the processes of a run ends, end the others, which would wait for it."""
    process.wait()
    for other in together:
        other.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
