"""All that a resume needs: LoRA weights, optimizer, schedule and step. Random state is none, see ``randomness``."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamlora.errors import UserError
from dreamlora.lora.pairs import restore_starts, starts_of
from dreamlora.runfolder import RunFolder, replacing_folder, write_atomically
from dreamlora.training.loop import Run

STATE_FILE = "training_state.pt"
SETTINGS_FILE = "settings.json"
TRAINABLES_FILE = "trainables.safetensors"
"""LoRA parameters by their names in the model, beside a LoRA file with diffusers' names."""
_DAMAGED = (errno.ENOENT, errno.EINVAL, None)
"""What reading a checkpoint says that lacks a file, or whose content cannot be right."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        path: its folder.
        settings: what a run that goes on from it must share.
        state: all that ``restore`` needs.
    """

    path: Path
    settings: dict[str, Any]
    state: dict[str, Any]


def save(run: Run) -> Path:
    """Write ``checkpoints/step-…`` so that at any moment it is either whole or not there. Main process only."""
    folder = run.folder.checkpoint_dir(run.step)
    scaler = run.accelerator.scaler
    state = {
        "step": run.step,
        "skipped_steps": run.skipped_steps,
        "trainables": {name: parameter.detach().cpu() for name, parameter in run.trainables.items()},
        "starts": starts_of(run.accelerator.unwrap_model(run.model)),
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    with replacing_folder(folder) as temporary:
        save_lora(run, temporary)
        torch.save(state, temporary / STATE_FILE)
        write_atomically(temporary / SETTINGS_FILE, json.dumps(run.settings, indent=1))
    return folder


def save_lora(run: Run, folder: Path) -> Path:
    """Write the LoRA as the stock pipeline loads it."""
    model = run.accelerator.unwrap_model(run.model)
    return run.family.save_lora(folder, model.denoiser, dict(model.encoders.items()))


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put the run where the checkpoint left off.

    Raises:
        UserError: the optimizer's state is not one of this run's optimizer.
    """
    saved = checkpoint.state
    try:
        run.optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:
        raise UserError(
            f"--resume_from_checkpoint: the optimizer of this run cannot go on from there: {error}"
        ) from None
    for name, parameter in run.trainables.items():
        parameter.data.copy_(saved["trainables"][name])
    restore_starts(run.accelerator.unwrap_model(run.model), saved["starts"])
    run.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if run.accelerator.scaler is not None and saved["scaler"]:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    run.step = saved["step"]
    run.skipped_steps = saved.get("skipped_steps", 0)  # older checkpoints have none


def rotate(folder: RunFolder, limit: int | None) -> None:
    """Keep the newest ``limit`` checkpoints."""
    steps = folder.checkpoint_steps()
    for step in steps[: -limit or None] if limit else []:
        shutil.rmtree(folder.checkpoint_dir(step))


def open_checkpoint(folder: RunFolder, which: str) -> Checkpoint:
    """Read the checkpoint that ``--resume_from_checkpoint`` means.

    A checkpoint of another run folder brings that run's measurements and samples along.

    Args:
        folder: of the run.
        which: "latest", a path, or the name of a folder in checkpoints/.

    Raises:
        UserError: there is none, or it is damaged or cannot be read.
    """
    path = _find(folder, which)
    other = RunFolder(path.parent.parent)
    if other.path.resolve() != folder.path.resolve() and other.holds_run() and not folder.holds_run():
        folder.adopt(other)
    try:
        settings = json.loads((path / SETTINGS_FILE).read_text())
        return Checkpoint(path, settings, torch.load(path / STATE_FILE, map_location="cpu", weights_only=True))
    except OSError as error:
        if error.errno not in _DAMAGED:  # it may be whole: nobody should be told to remove it
            raise UserError(f"cannot read {path}: {error}. Mend that, and resume again") from error
        raise _unreadable(path, error) from error
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is no checkpoint that can be read ({error}): remove it and resume from an earlier one")


def _find(folder: RunFolder, which: str) -> Path:
    steps = folder.checkpoint_steps()
    if which == "latest":
        if not steps:
            raise UserError(
                f"--resume_from_checkpoint latest: no checkpoint in {folder.checkpoints}; leave the flag out to start, "
                "with --overwrite_output_dir if the folder holds a run"
            )
        return folder.checkpoint_dir(steps[-1])
    return folder.named_checkpoint(which)
