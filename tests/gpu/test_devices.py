"""Every id of a GPU, or of an instance of a divided one (MIG), is a device of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dreamlora.sweep.gpus import MIG, visible_gpus
from tests.gpu.conftest import peak_mib

pytestmark = pytest.mark.gpu

ASK = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_name(0))"


def test_each_id_is_one_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert visible_gpus() == [], "as the environment says that the CPU is used"
        return
    ids = visible_gpus()
    assert len(ids) >= torch.cuda.device_count(), "a process sees one instance of a divided GPU, whatever there is"
    for one in ids[:2]:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": one}
        answer = subprocess.run(
            [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True
        )
        count, name = answer.stdout.strip().split(" ", 1)
        assert count == "1"
        assert ("MIG" in name) == one.startswith(MIG), f"{one} is {name}"


def test_memory_is_that_of_the_device(device: torch.device) -> None:
    """Of an instance of a divided GPU, and not of the whole."""
    if device.type == "cpu":
        assert peak_mib(device, list) == 0
        return
    total = torch.cuda.get_device_properties(0).total_memory
    free, there = torch.cuda.mem_get_info()
    assert free < there and there == pytest.approx(total, rel=0.05)
    assert peak_mib(device, lambda: torch.empty(2**26, dtype=torch.uint8, device=device)) == 64
