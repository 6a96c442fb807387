"""All that a resume needs: LoRA weights, optimizer, schedule and step. Random state is none, see ``randomness``."""

from __future__ import annotations

import errno
import io
import json
import logging
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.files import remove, replacing, replacing_folder, write_atomically
from dreamlora.lora import embeddings, saving
from dreamlora.lora.names import names_of
from dreamlora.lora.pairs import bare, restore_starts, starts_of
from dreamlora.models.new_tokens import by_token
from dreamlora.reading import Schema, UnreadableError, read_json
from dreamlora.runfolder import RunFolder
from dreamlora.training.adoption import adopt
from dreamlora.training.fit import misfit
from dreamlora.training.loop import Run
from dreamlora.training.state_file import read_state

STATE_FILE = "training_state.pt"
SETTINGS_FILE = "settings.json"
_DAMAGED = (errno.ENOENT, errno.EINVAL, None)
"""What reading a checkpoint says that lacks a file, or whose content cannot be right."""
_SETTINGS = Schema(dict[str, Any])

logger = logging.getLogger(__name__)


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
    with replacing_folder(folder) as temporary:
        save_lora(run, temporary)
        with replacing(temporary / STATE_FILE) as file, file.open("wb") as target:  # a path would hide why it failed
            torch.save(_state(run), target)
        write_atomically(temporary / SETTINGS_FILE, json.dumps(run.settings, indent=1))
    return folder


def taken(run: Run) -> tuple[int, bytes]:
    """The step and a copy of all that a resume needs, for ``put_back``."""
    content = io.BytesIO()
    torch.save(_state(run), content)
    return run.step, content.getvalue()


def put_back(run: Run, copy: tuple[int, bytes]) -> None:
    """Put the run where it was when the copy was taken."""
    restore(run, torch.load(io.BytesIO(copy[1]), map_location="cpu", weights_only=True))


def _state(run: Run) -> dict[str, Any]:
    scaler = run.accelerator.scaler
    return {
        "step": run.step,
        "skipped_steps": run.skipped_steps,
        "trainables": {name: parameter.detach().cpu() for name, parameter in run.trainables.items()},
        "averaged": {name: weights.cpu() for name, weights in run.average.hidden().items()} if run.average else {},
        "starts": starts_of(run.accelerator.unwrap_model(run.model)),
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "uncounted": {name: n - run.counted.get(name, 0) for name, n in counts(run).items()},
    }


def counts(run: Run) -> dict[str, int]:
    """What the optimizer has counted since this process began (clipped, skipped, ...). Waits for the GPU."""
    return dict(getattr(run.optimizer.optimizer, "stats", {}))


def save_lora(run: Run, folder: Path) -> Path:
    """Write the adapter, and the embeddings of new tokens beside it: all but LoHa and LoKr as the stock pipeline loads
    them.
    """
    model = run.accelerator.unwrap_model(run.model)
    counts_of = {new.token: new.vectors for new in run.config.tokens.tokens}
    embeddings.write(folder, by_token(counts_of, run.new_tokens), run.family.EMBEDDING_KEYS)
    modules = {run.family.DENOISER: model.denoiser, **dict(model.encoders.items())}
    pairs = registry.load("adapters", run.config.lora.adapter).PAIRS
    names = None if pairs else names_of(run.family, dict(bare(model.denoiser).config))
    return saving.save_lora(folder, modules, run.header(run.step), names)


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Put the run where a checkpoint's ``state`` was taken.

    Raises:
        UserError: the state is not one of this run's LoRA, schedule and optimizer; nothing was changed then.
    """
    problem = misfit(run, saved)
    if problem:
        raise UserError(f"--resume_from_checkpoint: this run cannot go on from there: {problem}")
    try:
        run.optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:
        raise UserError(
            f"--resume_from_checkpoint: the optimizer of this run cannot go on from there: {error}"
        ) from None
    for name, parameter in run.trainables.items():
        parameter.data.copy_(saved["trainables"][name])
    if run.average:
        run.average.take_up(saved["averaged"])
    restore_starts(run.accelerator.unwrap_model(run.model), saved["starts"])
    done = saved["lr_scheduler"]["last_epoch"]
    rates = [group["lr"] for group in run.optimizer.param_groups]
    # torch takes over whatever stands in a state, methods included
    now = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
    run.lr_scheduler.load_state_dict({**run.lr_scheduler.state_dict(), **now})
    if run.accelerator.scaler is not None and saved["scaler"]:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    run.step = saved["step"]
    run.skipped_steps = saved.get("skipped_steps", 0)  # older checkpoints have none
    counted = counts(run)
    run.counted = {name: counted.get(name, 0) - n for name, n in saved.get("uncounted", {}).items()}


def rotate(folder: RunFolder, limit: int | None) -> None:
    """Keep the newest ``limit`` checkpoints."""
    steps = folder.checkpoint_steps()
    for step in steps[: -limit or None] if limit else []:
        remove(folder.checkpoint_dir(step))


def find_checkpoint(folder: RunFolder, which: str, fits: Callable[[Checkpoint], None]) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; None: of the latest there is none yet.

    A latest one that is damaged is passed over, with a warning. A checkpoint of another run folder brings that run's
    measurements and samples along. Main process only.

    Args:
        folder: of the run.
        which: "latest", a path, or the name of a folder in checkpoints/.
        fits: raises a UserError for one that the run cannot go on from.

    Raises:
        UserError: there is none of this name; it is damaged or cannot be read; or ``fits`` says so.
    """
    if which == "latest":
        return _latest(folder, fits)
    path = folder.named_checkpoint(which)
    fits(open_checkpoint(path))
    other = RunFolder(path.parent.parent)
    if other.path.resolve() != folder.path.resolve() and other.holds_run() and not folder.holds_run():
        adopt(folder, other)
    return path


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        UserError: it is damaged (``DamagedCheckpoint``) or cannot be read.
    """
    with _reading(path):
        settings = read_json(path / SETTINGS_FILE, _SETTINGS, inside=path)
        state = read_state(path / STATE_FILE, inside=path)
        if re.fullmatch(r"step-\d{6,}", path.name) and int(path.name[5:]) != state["step"]:
            raise ValueError(f"its state is of step {state['step']}")
        return Checkpoint(path, settings, state)


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are missing, or not what was written."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DAMAGED:  # it may be whole: nobody should be told to remove it
            raise UserError(f"cannot read {path}: {error}. Mend that, and resume again") from error
        raise _unreadable(path, error) from error
    except UnreadableError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in _DAMAGED:
            raise UserError(f"{error}. Mend that, and resume again") from error
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    why = textwrap.shorten(str(error), 400)
    return DamagedCheckpoint(
        f"{path} is no checkpoint that can be read ({why}): remove it and resume from an earlier one"
    )


def _latest(folder: RunFolder, fits: Callable[[Checkpoint], None]) -> Path | None:
    damage: DamagedCheckpoint | None = None
    for step in reversed(folder.checkpoint_steps()):
        path = folder.checkpoint_dir(step)
        try:
            fits(open_checkpoint(path))
        except DamagedCheckpoint as error:
            logger.warning("%s", error)
            damage = error
            continue
        return path
    if damage is not None:
        raise UserError(
            f"--resume_from_checkpoint latest: no checkpoint in {folder.checkpoints} can be read. Remove them to begin "
            "anew"
        ) from damage
    return None
