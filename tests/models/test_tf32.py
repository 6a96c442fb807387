"""TF32 is used where it is allowed, in matrix products and convolutions alike, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dreamlora.commands.evaluate.command import main as evaluate
from dreamlora.commands.sample.command import main as sample
from dreamlora.models.tf32 import set_tf32
from tests.training.conftest import cache, flags_of, photos, train_with

__all__ = ["cache", "photos"]  # fixtures
QUICK = "--max_train_steps 1 --sample_steps 0 --eval_steps 1 --no_save_best --final_eval_items 0"


@pytest.fixture(autouse=True)
def afterwards() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def used() -> tuple[bool, bool]:
    """In matrix products and in convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("before", [(False, True), (True, False)])
@pytest.mark.parametrize("allowed", [True, False])
def test_both_are_set_whatever_was_set_before(allowed: bool, before: tuple[bool, bool]) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    set_tf32(allowed)
    assert used() == (allowed, allowed)


def test_every_run_sets_it_and_what_draws_or_measures_it_afterwards_too(
    sd_folder: Path, photos: Path, cache: Path, tmp_path: Path
) -> None:
    """One process may make one run after another, as ``compare`` does; and other programs look at them later."""
    runs = []
    for number, more in enumerate([["--allow_tf32"], []]):
        flags = flags_of(photos, cache, sd_folder, tmp_path / str(number))
        runs.append(str(train_with([*flags, *QUICK.split(), *more]).path))
        assert used() == (bool(more), bool(more))
    for run, allowed in zip(runs, (True, False), strict=True):
        sample(
            [
                run,
                "--trust_runs",
                "--output_dir",
                str(tmp_path / "grid"),
                "--num_inference_steps",
                "1",
                "--prompts",
                "a dog",
            ]
        )
        assert used() == (allowed, allowed)
        set_tf32(not allowed)
        evaluate([run, "--trust_runs", "--metrics", "eval_loss", "--output_dir", str(tmp_path / "out")])
        assert used() == (allowed, allowed)
        set_tf32(allowed)


def test_what_was_encoded_with_it_is_not_taken_for_what_was_encoded_without(
    sd_folder: Path, photos: Path, tmp_path: Path
) -> None:
    entries = []
    for more in ([], [], ["--allow_tf32"]):
        flags = flags_of(photos, tmp_path / "cache", sd_folder, tmp_path / "run")
        train_with([*flags, *QUICK.split(), "--eval_steps", "0", "--overwrite_output_dir", *more])
        entries.append({file for file in (tmp_path / "cache").rglob("*") if file.suffix == ".safetensors"})
    assert entries[0] and entries[0] == entries[1]
    assert len(entries[2]) == 2 * len(entries[0])
