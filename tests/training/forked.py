"""Trainings in processes of their own, without the seconds that a new interpreter takes to import everything."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence

LIMIT_S = 300


def run_forked(works: Sequence[Callable[[], object]], environments: Sequence[Mapping[str, str]]) -> list[int]:
    """Do each work in a child process with these variables; the exit codes (-9 for one that was killed)."""
    children = [_start(work, environment) for work, environment in zip(works, environments, strict=True)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def in_two_processes(work: Callable[[], object]) -> list[int]:
    """The same work by two processes that know of each other, as accelerate's launcher starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true"}
    return run_forked([work] * 2, [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)])


def _start(work: Callable[[], object], environment: Mapping[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        import signal

        signal.alarm(LIMIT_S)  # processes that wait for each other do it for ever
        os.environ |= environment
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
