"""Small complete runs on random models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image

from dreamlora import registry
from dreamlora.cli.parse import parse_run
from dreamlora.config import RunConfig
from dreamlora.config.programs import TextToImageConfig
from dreamlora.errors import UserError
from dreamlora.optimizers import lora_param_groups
from dreamlora.run import ending
from dreamlora.runfolder import RunFolder
from dreamlora.training.loop import Run


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures that are not square."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 20, 24, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs; that they share it is part of what is tested."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def flags(photos: Path, cache: Path, sd_folder: Path, tmp_path: Path) -> list[str]:
    """A run of six steps with everything switched on; flags given later win."""
    return flags_of(photos, cache, sd_folder, tmp_path / "run")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """For many runs of which nobody looks at the report: its charts take a quarter of a short one."""
    monkeypatch.setattr(ending, "write_report", lambda folder: None)


def flags_of(photos: Path, cache: Path, model: Path, output: Path) -> list[str]:
    """The same, for a run anywhere."""
    text = (
        f"--pretrained_model_name_or_path {model} --instance_data_dir {photos} --resolution 16 --max_train_steps 6 "
        f"--num_inference_steps 2 --eval_steps 3 --sample_steps 3 --checkpointing_steps 2 --rank 2 "
        f"--final_eval_items 32 --latents_cache_dir {cache} --output_dir {output}"
    )
    return [*text.split(), "--instance_prompt", "a photo of sks dog", "--learning_rate", "1e-2"]


@pytest.fixture
def train(flags: list[str]) -> Callable[..., RunFolder]:
    """Run with more flags, as the command line does."""
    return lambda *more: train_with([*flags, *more])


def train_with(flags: list[str], config_class: type[RunConfig] = RunConfig) -> RunFolder:
    """Run as the command line does."""
    from accelerate.state import AcceleratorState

    from dreamlora.run import assemble

    AcceleratorState._reset_state(reset_partial_state=True)  # precision and processes are fixed once per process
    return assemble.train(*parse_run(flags, config_class))


@pytest.fixture
def train_captioned(flags: list[str]) -> Callable[..., RunFolder]:
    """The same run on captioned images: text-to-image's flags without DreamBooth's."""
    shared = list(flags)
    for flag in ("--instance_data_dir", "--instance_prompt"):
        place = shared.index(flag)
        del shared[place : place + 2]
    return lambda *more: train_with([*shared, *more], TextToImageConfig)


@pytest.fixture(scope="session")
def prepare(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A run of a pipeline in a folder, ready for its first step, with nothing but the loop."""

    def prepare(model: Path, *more: str) -> Run:
        from accelerate.state import AcceleratorState

        from dreamlora.run import assemble

        AcceleratorState._reset_state(reset_partial_state=True)
        flags = flags_of(photos, cache, model, tmp_path_factory.mktemp("prepared") / "run")
        nothing = [word for event in ("sample", "eval", "checkpointing") for word in (f"--{event}_steps", "0")]
        return assemble.prepare(*parse_run([*flags, *nothing, *more]))

    return prepare


def with_optimizer(run: Run, name: str, scaler: torch.amp.GradScaler | None = None, **optim: Any) -> Run:
    """The run with another optimizer, which has made no step, as accelerate prepares it; weights stay where they are.

    Args:
        scaler: of fp16, which accelerate refuses on a CPU.
        optim: changes of ``config.Optim``.
    """
    try:
        registry.check_needs("optimizers", name)
    except UserError as error:
        pytest.skip(str(error))
    plugin = registry.load("optimizers", name)
    groups = lora_param_groups(run.accelerator.unwrap_model(run.model).denoiser, lr=1e-3)
    optimizer = plugin.build(groups, plugin.Options())
    run.accelerator.scaler = scaler
    return dataclasses.replace(
        run,
        config=dataclasses.replace(run.config, optim=dataclasses.replace(run.config.optim, **optim)),
        optimizer=AcceleratedOptimizer(optimizer, scaler=scaler),
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        step=0,
        skipped_steps=0,
    )
