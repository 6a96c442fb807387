"""Runs are spread over processes, one run after the other in each seat. No torch here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from dreamlora.errors import WriteError
from dreamlora.files import make_folder, open_at_end
from dreamlora.runfolder import RunFolder
from dreamlora.sweep.plan import Job
from dreamlora.sweep.seats import Seat
from dreamlora.sweep.worker import write_outcome

WORKER = (sys.executable, "-P", "-m", "dreamlora.sweep.worker")
"""Without -P a torch.py in the current folder, which may be a stranger's, would be taken for the package."""
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ROOT = Path(__file__).resolve().parents[2]
STATUSES = ("finished", "diverged", "failed")
"""How a run can end."""
_POLL_SECONDS = 0.2
_PATIENCE_S = 10.0
"""So long a process has to end that gave no answer, or whose partner has died."""
_STOP_S = 30.0
"""So long it has to end, and write a checkpoint before, when the comparison is stopped."""
_DEATHS = 3
"""After so many runs in a row that ended with its processes, a worker leaves what is left to the others, if any: they
may not be to blame, and would all be failed by it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """A run that is over.

    Attributes:
        status: one of ``STATUSES``.
    """

    job: Job
    status: str
    message: str
    seconds: float


class Pool:
    """Processes that make runs; as a context manager it ends them, also after Ctrl-C.

    Args:
        places: one per process.
        logs: folder for what the processes say, ``worker-0.log`` and so on.
        command: of a process; see ``worker``.
    """

    def __init__(self, places: Sequence[Seat], logs: Path, command: Sequence[str] = WORKER) -> None:
        make_folder(logs)
        self._workers = [_Worker(seat, logs / f"worker-{k}.log", command) for k, seat in enumerate(places)]
        self._closed = threading.Event()
        self._head_start = _HeadStart()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._head_start.over.set()
        for worker in self._workers:
            worker.stop()

    def run(self, jobs: Sequence[Job], on_end: Callable[[Ended], None]) -> None:
        """Make all runs; ``on_end`` is called in this thread, after each. Every run ends, whatever goes wrong with it.

        The first run gets a head start, see ``_HeadStart``.

        Raises:
            WriteError: the disk is full.
        """
        workers = self._workers[: len(jobs)]
        waiting, ended = _Waiting(jobs, len(workers)), queue.Queue[Ended | BaseException]()
        for worker in workers:
            threading.Thread(target=self._serve, args=(worker, waiting, ended), daemon=True).start()
        for _ in jobs:
            result = _next(ended)
            if isinstance(result, BaseException):
                raise result
            on_end(result)

    def _serve(self, worker: _Worker, waiting: _Waiting, ended: queue.Queue[Ended | BaseException]) -> None:
        """Make runs with one worker until none is left. What is raised goes to the thread that waits for the ends."""
        try:
            with contextlib.suppress(Exception):  # the first run tells, if it lasts
                worker.start()  # its imports overlap with the head start
            worker.deaths = 0
            while self._serve_one(worker, waiting, ended):
                pass
        except BaseException as error:
            ended.put(error)

    def _serve_one(self, worker: _Worker, waiting: _Waiting, ended: queue.Queue[Ended | BaseException]) -> bool:
        """Make a run; whether this worker goes on."""
        with self._head_start.turn():
            job = waiting.take()
            if job is None or self._closed.is_set():
                return False
            self._head_start.begin(job)
            result = self._result(worker, job)
            if self._closed.is_set():
                return False  # stopped by us: the run is neither finished nor failed
            if result is None and waiting.leave(job):
                logger.warning("%s: the other workers make what is left", worker.trouble)
                return False
            result = result or Ended(job, "failed", worker.trouble, 0.0)
            if result.status != "failed":
                self._head_start.over.set()
            ended.put(_recorded(result))
        if worker.deaths >= _DEATHS and waiting.leave():
            text = "%d runs in a row ended with their process, see %s: the other workers make what is left"
            logger.warning(text, worker.deaths, worker.log)
            return False
        return True

    def _result(self, worker: _Worker, job: Job) -> Ended | None:
        """How a run ended, also if that is by an error here; None: the worker could not be started."""
        began = time.monotonic()
        try:
            return worker.make(job) if worker.ready() else None
        except Exception as error:
            if isinstance(error, WriteError) and error.disk_full:
                raise
            worker.stop()
            message = f"{type(error).__name__}: {error}; see {worker.log}"
            return Ended(job, "failed", message, time.monotonic() - began)


class _Waiting:
    """Runs that wait for a worker, and how many workers take them."""

    def __init__(self, jobs: Sequence[Job], workers: int) -> None:
        self._jobs = deque(jobs)
        self._workers = workers
        self._lock = threading.Lock()

    def take(self) -> Job | None:
        """The next run; None: none is left, and the caller is done."""
        with self._lock:
            if self._jobs:
                return self._jobs.popleft()
            self._workers -= 1
            return None

    def leave(self, job: Job | None = None) -> bool:
        """Whether other workers make what is left, and a run that is given back. Then the caller is done."""
        with self._lock:
            if self._workers == 1:
                return False
            self._workers -= 1
            if job is not None:
                self._jobs.appendleft(job)
            return True


class _HeadStart:
    """The first run goes ahead until it trains: it fills the caches that all share (encoded images, class images).

    Two processes that encode the same images in other batches would round them differently, and their runs could then
    not be compared. If the first run fails before, the next one goes ahead.

    Attributes:
        over: set when all may begin.
    """

    def __init__(self) -> None:
        self.over = threading.Event()
        self._ahead = threading.Lock()
        self._file: Path | None = None
        self._began = 0.0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """For a run: wait until all may begin, or nobody is ahead; then it is."""
        ahead = self._wait()
        try:
            yield
        finally:
            if ahead:
                self._ahead.release()

    def begin(self, job: Job) -> None:
        """The run that is ahead: once it has measured the base model, all caches are filled."""
        self._file, self._began = RunFolder(job.folder).metrics_file, time.time()

    def _wait(self) -> bool:
        """Whether the caller is ahead now."""
        while not self.over.is_set():
            if self._ahead.acquire(blocking=False):
                return True
            if _modified(self._file) > self._began:
                self.over.set()
            self.over.wait(_POLL_SECONDS)
        return False


class _Worker:
    """The processes of one seat; those that die, or have made their runs, are replaced.

    Attributes:
        log: what the processes say.
        trouble: why they could not be started.
        deaths: runs in a row that ended without an answer.
    """

    def __init__(self, seat: Seat, log: Path, command: Sequence[str]) -> None:
        self.log = log
        self.trouble = ""
        self.deaths = 0
        self._seat = seat
        self._command = command
        self._processes: list[subprocess.Popen[str]] = []
        self._made = 0

    def ready(self) -> bool:
        """Whether the processes run; started if there are none.

        Raises:
            WriteError: the disk is full.
        """
        try:
            self.start()
        except (OSError, WriteError) as error:
            if isinstance(error, WriteError) and error.disk_full:
                raise
            self.trouble = f"a process could not be started: {error}"
            return False
        return True

    def start(self) -> None:
        """Start the processes if there are none."""
        if self._processes and self._processes[0].poll() is None:
            return
        self.stop()
        port = _free_port()
        try:
            for rank in range(self._seat.processes):
                self._processes.append(self._start(rank, port))
        except BaseException:
            self.stop()
            raise
        if self._seat.processes > 1:
            together = tuple(self._processes)
            for process in together:
                threading.Thread(target=_end_together, args=(process, together), daemon=True).start()
        self._made = 0

    def _start(self, rank: int, port: int) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        if self._seat.processes > 1:  # what accelerate launch would set
            places = (rank, rank, self._seat.processes, "127.0.0.1", port)
            environment |= dict(zip(_LAUNCHER, map(str, places), strict=True))
        if _ROOT.name not in ("site-packages", "dist-packages"):  # a checkout: this very one
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), environment.get("PYTHONPATH"))))
        with open_at_end(self.log) as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                errors="backslashreplace",
                env={**environment, **self._seat.environment},
                start_new_session=True,  # Ctrl-C is for the program that knows what was finished
            )

    def make(self, job: Job) -> Ended:
        """Make a run with the processes that were started, and wait for its end; one that dies has failed at it."""
        began = time.monotonic()
        order = {"program": job.program, "argv": list(job.argv), "folder": str(job.folder), "method": job.method}
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            for process in self._processes:
                _pipe(process.stdin).write(json.dumps(order) + "\n")
                _pipe(process.stdin).flush()
            answer = _pipe(self._processes[0].stdout).readline()
        outcome = _outcome(answer)
        self.deaths = 0 if outcome else self.deaths + 1
        status, message = outcome or ("failed", f"{self._death(answer)}; see {self.log}")
        self._made += 1
        if self._made == self._seat.runs_per_process or not outcome:
            self.stop()
        return Ended(job, status, message, time.monotonic() - began)

    def _death(self, answer: str) -> str:
        """What became of processes that gave no answer."""
        if answer.endswith("\n"):
            return f"its process answered {answer[:80].strip()!r} instead of how it ended"
        try:
            return f"its process ended with status {self._processes[0].wait(_PATIENCE_S)}"
        except subprocess.TimeoutExpired:
            return "its process does not answer any more"

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []


def _outcome(answer: str) -> tuple[str, str] | None:
    """Status and message of a worker's answer; None if it is none."""
    try:
        fields = json.loads(answer)
        status, message = fields["status"], fields["message"]
    except (ValueError, TypeError, KeyError):
        return None
    return (status, message) if status in STATUSES and isinstance(message, str) else None


def _recorded(result: Ended) -> Ended:
    """The same, after a failure is written down, which a process that died could not do.

    Raises:
        WriteError: the disk is full.
    """
    if result.status != "failed":
        return result
    try:
        write_outcome(RunFolder(result.job.folder), result.job.method, result.status, result.message)
    except WriteError as error:
        if error.disk_full:
            raise
        return replace(result, message=f"{result.message}. That could not be written down: {error}")
    return result


def _modified(file: Path | None) -> float:
    """When a file was last written; 0 if that cannot be said."""
    try:
        return file.stat().st_mtime if file else 0.0
    except OSError:
        return 0.0


def _end_together(process: subprocess.Popen[str], together: Sequence[subprocess.Popen[str]]) -> None:
    """When one of the processes of a run ends, end the others, which would wait for it."""
    process.wait()
    for other in together:
        other.terminate()  # it may have a checkpoint to write
    for other in together:
        try:
            other.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            other.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("a worker was started without pipes")
    return stream


def _next(ended: queue.Queue[Ended | BaseException]) -> Ended | BaseException:
    """Wait in short pieces: a wait without end would not notice Ctrl-C on every system."""
    while True:
        try:
            return ended.get(timeout=1)
        except queue.Empty:
            continue
