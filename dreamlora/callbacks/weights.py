"""Other weights in the LoRA's place for a while: those of the base model, or of a step that was kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.lora.pairs import tuned_layers
from dreamlora.processes import tell_everyone
from dreamlora.runfolder import TRAINABLES_FILE
from dreamlora.training.loop import Run


@contextlib.contextmanager
def base_model(run: Run) -> Iterator[None]:
    """The LoRA has no effect in here, to the last bit, and new tokens are what they started as; afterwards all is as
    it was.
    """
    with _kept_weights(run):
        for part in run.new_tokens.values():
            part.rows.data.copy_(part.start)
        for layer in tuned_layers(run.accelerator.unwrap_model(run.model)):
            layer.silence()
        yield


@contextlib.contextmanager
def before_first_step(run: Run) -> Iterator[None]:
    """The LoRA is what a resumed run has begun with: without effect, or that of ``--init_lora``."""
    with base_model(run):
        for name, value in run.begun_with.items():
            run.trainables[name].data.copy_(value)
        yield


@contextlib.contextmanager
def candidate(run: Run, step: int) -> Iterator[None]:
    """The LoRA is that of a step that was kept; afterwards it is as it was. The main process reads the file.

    Raises:
        UserError: the file is missing, damaged, or another LoRA's.
    """
    main = run.accelerator.is_main_process
    stored: Any = None
    if main:
        try:
            stored = _read_trainables(run, run.folder.candidate_dir(step) / TRAINABLES_FILE)
        except UserError as error:
            stored = error
    problem = tell_everyone(stored if isinstance(stored, UserError) else None)
    if problem is not None:
        raise problem
    with _kept_weights(run):
        for name, parameter in run.trainables.items():
            value = stored[name].to(parameter) if main else torch.empty_like(parameter)
            parameter.data.copy_(broadcast(value))
        yield


def _read_trainables(run: Run, file: Path) -> dict[str, Tensor]:
    """The run's own parameters by name, as they were kept.

    Raises:
        UserError: the file is missing or damaged, or holds those of another LoRA.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in run.trainables.items()}
    try:
        with open_tensors(file, inside=run.folder.path) as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            if shapes != wanted:
                raise UserError(f"{file} holds other weights than those of this LoRA: remove its folder")
            tensors = {name: opened.get_tensor(name) for name in wanted}
    except FileNotFoundError:
        raise UserError(f"{file} is missing: remove its folder") from None
    if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UserError(f"{file} holds weights that are not finite numbers: remove its folder")
    return tensors


@contextlib.contextmanager
def _kept_weights(run: Run) -> Iterator[None]:
    before = {name: parameter.detach().clone() for name, parameter in run.trainables.items()}
    try:
        yield
    finally:
        for name, parameter in run.trainables.items():
            parameter.data.copy_(before[name])
