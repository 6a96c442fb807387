"""Everything that a run writes can be read by whom the umask lets read it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamlora.commands.sample import command
from dreamlora.runfolder import RunFolder


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077], ids=oct)
def test_files_have_the_modes_that_the_umask_gives(umask: int, train: Callable[..., RunFolder], tmp_path: Path) -> None:
    """LoRAs, checkpoints, evaluation sets, cache, class images, pictures, report: a colleague shares the disk."""
    more = ["--max_train_steps", "2", "--eval_steps", "1", "--sample_steps", "2", "--checkpointing_steps", "1"]
    more += [
        "--with_prior_preservation",
        "--class_prompt",
        "dog",
        "--num_class_images",
        "2",
        "--report_to",
        "tensorboard",
    ]
    before = os.umask(umask)
    try:
        run = train(
            *more, "--output_dir", str(tmp_path / "out" / "run"), "--latents_cache_dir", str(tmp_path / "cache")
        )
        command.main([str(run.path), "--output_dir", str(tmp_path / "drawn"), "--prompts", "a dog", "--trust_runs"])
    finally:
        os.umask(before)
    wrong = []
    written = [file for place in ("out", "cache", "drawn") for file in (tmp_path / place).rglob("*")]
    for file in written:
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode != (0o777 if file.is_dir() else 0o666) & ~umask:
            wrong.append(f"{file.relative_to(tmp_path)}: {mode:o}")
    assert wrong == [] and len(written) > 50
