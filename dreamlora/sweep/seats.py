"""Where runs can go: one per GPU, or several on the CPU, or several processes that share a run. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from dreamlora.errors import UserError
from dreamlora.sweep.gpus import MIG, visible_gpus


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


def seats(workers: int | None, embedded: bool, processes: int = 1) -> list[Seat]:
    """Where runs can go: the GPUs, else the cores.

    Args:
        workers: how many are wanted; None: as many as there are GPUs for; without one, one per core for an embedded
            model, else one. The cores are shared out as threads, unless OMP_NUM_THREADS says how many a process gets.
        embedded: whether an embedded model is trained, of which several copies fit into any memory.
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
