"""Which GPUs, or MIG instances of GPUs, there are; asked of the driver, as torch would take seconds to load."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

MIG = "MIG-"
"""How the ids of instances begin."""

_LINE = re.compile(r"(?:GPU (?P<number>\d+):|\s+MIG ).*\(UUID: (?P<id>[^)]+)\)")


def visible_gpus() -> list[str]:
    """Ids of the devices as CUDA_VISIBLE_DEVICES takes them ("0", "GPU-...", "MIG-..."); it decides if it is set."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        ids = [one.strip() for one in chosen.split(",")]
        end = next((place for place, one in enumerate(ids) if one in ("", "-1")), len(ids))
        return ids[:end]
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not shutil.which("nvidia-smi"):
        return []
    asked = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, encoding="utf-8", check=False)
    return listed(asked.stdout)


def listed(lines: str) -> list[str]:
    """The devices in what ``nvidia-smi --list-gpus`` prints.

    A GPU that is divided (MIG) is none itself: its number means its first instance, and the others could not be had.
    Beside instances, numbers are counted otherwise, so that everything goes by its UUID then.
    """
    devices: list[tuple[str, str]] = []  # number, if it has one, and UUID
    divided = False
    for line in filter(None, map(_LINE.match, lines.splitlines())):
        number = line["number"] or ""
        if not number:
            if devices and devices[-1][0]:
                devices.pop()  # the GPU that this is the first instance of
            divided = True
        devices.append((number, line["id"]))
    return [uuid if divided else number for number, uuid in devices]
