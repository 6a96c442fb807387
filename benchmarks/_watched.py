"""Run a program as python would, and write down when its optimizer stepped and how much memory it took.

    python benchmarks/_watched.py RESULT.json SCRIPT [FLAGS]
    python benchmarks/_watched.py RESULT.json -m MODULE [FLAGS]

The same for every program, whatever it shows itself: a hook of torch marks the end of each optimizer step, on a GPU in
its own stream, so that nobody waits for it. WATCHED_MEMORY_GIB in the environment caps what torch may take of the GPU's
memory, as a smaller card would.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

CAP = "WATCHED_MEMORY_GIB"


class Watch:
    """When the optimizer's steps ended, and peaks of memory over all times that the program counted them anew."""

    def __init__(self) -> None:
        self._marks: list[Any] = []
        self._peaks = [0, 0]
        self._reset = torch.cuda.reset_peak_memory_stats
        torch.cuda.reset_peak_memory_stats = self._count_anew
        register_optimizer_step_post_hook(self._mark)

    def _mark(self, *_: Any) -> None:
        if not torch.cuda.is_initialized():
            self._marks.append(1e3 * time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def _count_anew(self, *given: Any, **named: Any) -> None:
        self._see_peaks()
        self._reset(*given, **named)

    def _see_peaks(self) -> None:
        now = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self._peaks = [max(pair) for pair in zip(self._peaks, now, strict=True)]

    def figures(self) -> dict[str, Any]:
        """``ends_ms``: when each step ended, from the end of the first; ``allocated_gib``, ``reserved_gib``: peaks by
        torch, None without a GPU; ``host_gib``: largest resident memory.
        """
        gpu = torch.cuda.is_initialized()
        if gpu:
            torch.cuda.synchronize()
            self._see_peaks()
        return {
            "ends_ms": [self._since_first(mark) for mark in self._marks],
            "allocated_gib": self._peaks[0] / 2**30 if gpu else None,
            "reserved_gib": self._peaks[1] / 2**30 if gpu else None,
            "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2**30 if sys.platform == "darwin" else 2**20),
        }

    def _since_first(self, mark: Any) -> float:
        first = self._marks[0]
        return float(mark - first if isinstance(mark, float) else first.elapsed_time(mark))


def main() -> None:
    """Cap, run, write."""
    result = Path(sys.argv[1])
    del sys.argv[:2]
    if CAP in os.environ:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(os.environ[CAP]) * 2**30 / total))
    watch = Watch()
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        result.write_text(json.dumps(watch.figures()), encoding="utf-8")


if __name__ == "__main__":
    main()
