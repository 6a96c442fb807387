"""Weights that were kept and are measured later: those of this LoRA, or one message, and the LoRA is as it was."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from dreamlora.callbacks.weights import candidate
from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from tests.fuzzing import damaged, fuzzed, harmless

WEIGHTS = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(3, 2)}
SOUND = save(WEIGHTS)


def run_in(folder: Path) -> Any:
    return SimpleNamespace(
        folder=RunFolder(folder),
        accelerator=SimpleNamespace(is_main_process=True),
        trainables={name: torch.nn.Parameter(torch.zeros_like(tensor)) for name, tensor in WEIGHTS.items()},
    )


def measured(run: Any) -> list[float]:
    """Sums of the weights while those of step 5 are in the LoRA."""
    try:
        with candidate(run, 5):
            return [float(parameter.detach().sum()) for parameter in run.trainables.values()]
    finally:
        assert all(not parameter.detach().any() for parameter in run.trainables.values())


def put(folder: Path, content: bytes) -> Path:
    file = folder / "checkpoints" / "candidates" / "step-000005" / "trainables.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def test_a_sound_one(tmp_path: Path) -> None:
    put(tmp_path, SOUND)
    assert measured(run_in(tmp_path)) == [8.0, 6.0]


ODD = {
    "broadcast": {**WEIGHTS, "a.lora_A.weight": torch.ones(1, 4)},
    "one more": {**WEIGHTS, "b": torch.ones(1)},
    "one less": {"a.lora_A.weight": torch.ones(2, 4)},
    "not finite": {**WEIGHTS, "a.lora_A.weight": torch.full((2, 4), torch.nan)},
    "whole numbers": {**WEIGHTS, "a.lora_A.weight": torch.ones(2, 4).int()},
    "nothing": {},
}


@pytest.mark.parametrize("tensors", ODD.values(), ids=ODD)
def test_weights_of_another_lora(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    put(tmp_path, save(tensors))
    with pytest.raises(UserError, match="remove its folder"):
        measured(run_in(tmp_path))


def test_a_file_that_is_none_or_lies_elsewhere(tmp_path: Path) -> None:
    file = put(tmp_path / "run", SOUND)
    outside = file.rename(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="is missing"):
        measured(run_in(tmp_path / "run"))
    file.symlink_to(outside)
    with pytest.raises(UserError, match="link leads out"):
        measured(run_in(tmp_path / "run"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="not a file"):
        measured(run_in(tmp_path / "run"))


@fuzzed
@given(st.one_of(damaged(SOUND), st.just(SOUND)))
def test_fuzz_candidate(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    put(folder, content)
    harmless(lambda: measured(run_in(folder)))
