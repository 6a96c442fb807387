"""Where runs can go: one per GPU, or several on the CPU, or several processes that share a run. No torch here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from dreamlora.errors import UserError


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
        workers: how many are wanted; None: as many as there are GPUs for; without one, one per core for the embedded
            model, else one. The cores are shared out as threads, unless OMP_NUM_THREADS says how many a process gets.
        embedded: whether the embedded model is trained, of which several copies fit into any memory.
        processes: that share a run.

    Raises:
        UserError: there are fewer GPUs than processes that share a run.
    """
    gpus = visible_gpus()
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


def visible_gpus() -> list[str]:
    """Their ids as CUDA_VISIBLE_DEVICES takes them; asked of the driver, as torch would take seconds to load."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [one for one in told.split(",") if one.strip() not in ("", "-1")]
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not shutil.which("nvidia-smi"):
        return []
    asked = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(k) for k, _ in enumerate(line for line in asked.stdout.splitlines() if line.startswith("GPU "))]
