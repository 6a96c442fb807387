"""GPUs and their MIG instances as the driver lists them; the nvidia-smi here is a script that prints such a list."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamlora.errors import UserError
from dreamlora.sweep.gpus import visible_gpus
from dreamlora.sweep.seats import seats

PLAIN = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
"""
DIVIDED = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaaa)
  MIG 3g.40gb     Device  0: (UUID: MIG-0a)
  MIG 1g.10gb     Device  1: (UUID: MIG-0b)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-bbbb)
  MIG 1g.10gb     Device  0: (UUID: MIG-GPU-bbbb/7/0)
"""
HALF = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaaa)
  MIG 1c.3g.40gb  Device  0: (UUID: MIG-0a)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-bbbb)
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes an nvidia-smi that prints a list of GPUs and ends with a status."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)

    def driver(printed: str, status: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\n[ \"$1\" = --list-gpus ] || exit 9\ncat <<'END'\n{printed}END\nexit {status}\n",
            encoding="utf-8",
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    return driver


@pytest.mark.parametrize(
    ("printed", "ids"),
    [
        (PLAIN, ["0", "1"]),
        (DIVIDED, ["MIG-0a", "MIG-0b", "MIG-GPU-bbbb/7/0"]),
        (HALF, ["MIG-0a", "GPU-bbbb"]),
        ("No devices found.\n", []),
    ],
    ids=["whole", "divided", "one divided", "none"],
)
def test_every_gpu_or_instance_is_a_device(driver, printed: str, ids: list[str]) -> None:
    driver(printed)
    assert visible_gpus() == ids


def test_a_driver_that_does_not_answer_has_no_gpus(driver) -> None:
    driver("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", status=9)
    assert visible_gpus() == []


def test_what_the_environment_says_comes_first(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(DIVIDED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0b, GPU-bbbb")
    assert visible_gpus() == ["MIG-0b", "GPU-bbbb"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,-1,0")
    assert visible_gpus() == ["1"], "CUDA ignores what follows a number that it does not know"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert visible_gpus() == []


def test_each_instance_gets_a_run_and_no_run_gets_two(driver) -> None:
    driver(DIVIDED)
    places = [seat.environment["CUDA_VISIBLE_DEVICES"] for seat in seats(None, embedded=True)]
    assert places == ["MIG-0a", "MIG-0b", "MIG-GPU-bbbb/7/0"]
    with pytest.raises(UserError, match=r"--processes_per_run 2: .* MIG instance.*leave it out"):
        seats(None, embedded=True, processes=2)
