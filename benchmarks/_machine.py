"""What every benchmark writes beside its figures: versions and machine, without names and paths; where it writes."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dreamlora.run import provenance

RESULTS = Path(__file__).parent / "results"


def describe(threads: int) -> dict[str, Any]:
    """System, processor, memory and GPU; the threads that torch was given; versions; commit of this program."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
    }


def usable_cores() -> int:
    """Cores that this process may use, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def card(device: str) -> dict[str, Any]:
    """What was measured on, with what decides its speed."""
    if device == "cpu":
        return {"name": "CPU", "mig": False}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "mig": "MIG" in properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, encoding="utf-8", check=False).stdout.split()
    return lines[0] if lines else None


def file_name(benchmark: str, name: str) -> str:
    """Of its result on a card: of "gpu_check" and "NVIDIA H100 80GB HBM3" it is gpu_check_h100_80gb_hbm3."""
    return f"{benchmark}_" + re.sub(r"[^a-z0-9]+", "_", name.lower().removeprefix("nvidia ")).strip("_")


def command(script: str) -> str:
    """The command line, to be typed again; folders of this machine are cut down to their last name."""
    words = [Path(word).name if word.startswith(("/", "~", "..")) else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{script}", *map(shlex.quote, words)])


def write(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``<folder>/<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return file


def _processor() -> str:
    """The processor's model where the system says it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
