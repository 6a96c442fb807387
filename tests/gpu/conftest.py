"""What only a GPU can show: runs of SD 1.5's size in every precision. The whole folder is skipped where there is none.

DREAMLORA_GPU_TESTS_DEVICE=cpu runs the same code on the CPU with a model of a few thousand weights, which shows that
the tests work, and nothing about GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Asked for when CUDA starts; without it, products of matrices are refused where results must be reproducible.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from peft.tuners.lora import Linear

from dreamlora.run import ending
from dreamlora.runfolder import RunFolder
from dreamlora.tiny.subjects import write_instance_images
from tests import tinymodels
from tests.benchmarks.test_benchmarks import load
from tests.training.conftest import train_with

SWITCH = "DREAMLORA_GPU_TESTS_DEVICE"
RATES = {"adamw": "1e-3", "scaled_adamw": "1e-3", "lora_muon": "3e-2", "lora_rite": "1e-3"}
"""The optimizers of the tier, with rates at which the loss of a random model falls within a few steps."""
STEPS = 6


@dataclass(frozen=True)
class Trained:
    """A run that has ended.

    Attributes:
        unfused: forward passes of its LoRA layers that were PEFT's own.
    """

    folder: RunFolder
    unfused: int

    def values(self, name: str) -> dict[int, float]:
        """A logged value by step."""
        return {row["step"]: row["value"] for row in self.folder.metrics() if row["name"] == name}


Train = Callable[..., Trained]


def chosen_device() -> torch.device:
    """The GPU, or the CPU if the switch says so; without either, the test is skipped."""
    kind = os.environ.get(SWITCH, "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"there is no GPU; with {SWITCH}=cpu a small model runs on the CPU")
    return torch.device(kind)


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Where the runs train."""
    chosen = chosen_device()
    with pytest.MonkeyPatch.context() as patch:
        if chosen.type == "cpu":
            patch.setenv("ACCELERATE_USE_CPU", "true")
        yield chosen


@pytest.fixture(scope="session")
def flags(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of a few steps that measures the loss at both ends; flags given later win.

    The pictures have twice as many pixels a side as their latents, whose autoencoder is a small one in any case.
    """
    folder = tmp_path_factory.mktemp("gpu")
    unets = load("_unets")
    unet = unets.random_unet(unets.SD15, device).half() if device.type == "cuda" else None
    model = tinymodels.save_sd(folder / "model", unet=unet)
    write_instance_images(folder / "photos", "checkerling", 10)
    text = (
        f"--pretrained_model_name_or_path {model} --instance_data_dir {folder / 'photos'} --holdout 2 --rank 4 "
        f"--train_batch_size 2 --max_train_steps {STEPS} --eval_steps {STEPS} --final_eval_items 0 --sample_steps 0 "
        f"--num_inference_steps 2 --checkpointing_steps {STEPS // 2} --latents_cache_dir {folder / 'cache'}"
    )
    return [*text.split(), "--instance_prompt", "sks dog"]


@pytest.fixture(scope="session")
def train(flags: list[str], device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Run as the command line does, with a precision, an optimizer and more flags."""

    def train(precision: str, optimizer: str, *more: str) -> Trained:
        if precision == "fp16" and device.type == "cpu":
            pytest.skip("accelerate has no fp16 on a CPU")
        clear(device)
        own = ["--mixed_precision", precision, "--optimizer", optimizer, "--learning_rate", RATES[optimizer]]
        output = ["--output_dir", str(tmp_path_factory.mktemp("run") / "run")]
        with pytest.MonkeyPatch.context() as patch, counted(Linear, "forward") as unfused:
            patch.setattr(ending, "write_report", lambda *_: None)  # seconds of charts, which are the CPU's work
            folder = train_with([*flags, *own, *output, *more])
        return Trained(folder, len(unfused))

    return train


@pytest.fixture(scope="session")
def trained(train: Train) -> Callable[[str, str], Trained]:
    """Runs by precision and optimizer, each made once for all tests."""
    return functools.cache(train)


@contextlib.contextmanager
def counted(owner: type, name: str) -> Iterator[list[str]]:
    """Collects the name of a method once per call."""
    calls: list[str] = []
    original = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield calls


def clear(device: torch.device) -> None:
    """Give back what has been freed, and begin to measure the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: torch.device, work: Callable[[], object]) -> float:
    """Memory that ``work`` took at most, beyond what was allocated before; 0 on a CPU, which does not count."""
    clear(device)
    if device.type == "cpu":
        work()
        return 0.0
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
