"""What torch says of a GPU's memory: peaks of every stage, an autoencoder that leaves, and memory that is too small."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamlora.__main__ import main
from dreamlora.callbacks.sample import SampleCallback
from dreamlora.memory import ALLOCATED, GIB, RESERVED, StageMemory
from dreamlora.training import loop
from tests.gpu.conftest import STEPS, Train, clear

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type == "cpu":
        pytest.skip("a CPU has no memory of its own")
    return device


def test_peaks_are_what_torch_says(cuda: torch.device) -> None:
    clear(cuda)
    memory = StageMemory(cuda)
    before = torch.cuda.memory_allocated()
    with memory.stage("training"):
        held = torch.empty(2**26, device=cuda)
        with memory.stage("drawing samples"):
            torch.empty(2**28, device=cuda)
    peaks = memory.peaks()
    assert peaks["training"][ALLOCATED] - before == pytest.approx(2**28, abs=2**21)
    assert peaks["drawing samples"][ALLOCATED] - before == pytest.approx(2**28 + 2**30, abs=2**22)
    assert peaks["drawing samples"][RESERVED] >= peaks["drawing samples"][ALLOCATED]
    del held


def test_a_run_says_what_its_stages_took(train: Train, cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    original = loop.optimizer_step

    def noted(*given: Any) -> Any:
        result = original(*given)
        steps.append(torch.cuda.max_memory_allocated() / GIB)
        return result

    monkeypatch.setattr(loop, "optimizer_step", noted)
    images = ("--sample_steps", str(STEPS), "--num_images_per_prompt", "2")
    folder = train("bf16", "adamw", *images, "--max_train_steps", str(2 * STEPS)).folder
    summary = json.loads(folder.summary_file.read_text(encoding="utf-8"))
    peaks = {stage: kinds[ALLOCATED] for stage, kinds in summary["peak_memory"].items()}
    assert {"encoding images", "encoding prompts", "loading the model", "training", "drawing samples"} <= peaks.keys()
    assert peaks["training"] == pytest.approx(max(steps), abs=0.002)
    assert summary["peak_memory_gib"] == max(peaks.values())


def test_the_autoencoder_is_on_the_gpu_only_while_samples_are_drawn(
    train: Train, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    draw, step = SampleCallback._drawn, loop.optimizer_step
    vae: list[Any] = []

    def drawn(self: Any, run: Any, number: int) -> Any:
        vae[:] = [run.vae()["vae"]]
        seen.append(f"drawing {vae[0].device.type}")
        return draw(self, run, number)

    def stepped(*given: Any) -> Any:
        seen.append(f"training {vae[0].device.type}")
        return step(*given)

    monkeypatch.setattr(SampleCallback, "_drawn", drawn)
    monkeypatch.setattr(loop, "optimizer_step", stepped)
    train("bf16", "adamw", "--sample_steps", str(STEPS))
    assert seen == ["drawing cuda", *["training cpu"] * STEPS, "drawing cuda"]


@pytest.fixture
def small_memory(cuda: torch.device) -> Iterator[float]:
    """2.4 GiB: SD 1.5's UNet in bf16 and its LoRA fit, a step of many images does not."""
    clear(cuda)
    total = torch.cuda.get_device_properties(cuda).total_memory / GIB
    used = torch.cuda.memory_reserved() / GIB
    torch.cuda.set_per_process_memory_fraction((used + 2.4) / total)
    yield 2.4
    torch.cuda.set_per_process_memory_fraction(1.0)
    clear(cuda)


def test_memory_that_does_not_suffice_is_told_with_its_parts(
    flags: list[str], small_memory: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    more = ["--mixed_precision", "bf16", "--resolution", "128", "--train_batch_size", "64", "--eval_steps", "0"]
    assert main(["dreambooth", *flags, *more, "--output_dir", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: memory does not suffice in the stage 'training' (CUDA out of memory")
    assert "GiB were in use on the GPU: denoiser 1.6" in told and "LoRA, gradients and optimizer" in told
    assert "--gradient_checkpointing; --train_batch_size 1 --gradient_accumulation_steps 64" in told
    assert ("expandable_segments" in told) == (
        "expandable_segments" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    )
