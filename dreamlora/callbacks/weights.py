"""Other weights in the LoRA's place for a while: those of the base model, or of a step that was kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import Tensor

from dreamlora.lora.pairs import adapted_layers
from dreamlora.processes import wait_for_everyone
from dreamlora.runfolder import TRAINABLES_FILE
from dreamlora.training.loop import Run


@contextlib.contextmanager
def base_model(run: Run) -> Iterator[None]:
    """The LoRA has no effect in here, to the last bit; afterwards it is as it was."""
    with _kept_weights(run):
        for layer in adapted_layers(run.accelerator.unwrap_model(run.model)):
            if layer.start is None:
                layer.B.data.zero_()
            else:
                layer.A.data.copy_(layer.start.A)
                layer.B.data.copy_(layer.start.B)
        yield


@contextlib.contextmanager
def candidate(run: Run, step: int) -> Iterator[None]:
    """The LoRA is that of a step that was kept; afterwards it is as it was. The main process reads the file."""
    main = run.accelerator.is_main_process
    stored: Mapping[str, Tensor] = load_file(run.folder.candidate_dir(step) / TRAINABLES_FILE) if main else {}
    wait_for_everyone()  # the file may come from a slow disk
    with _kept_weights(run):
        for name, parameter in run.trainables.items():
            value = stored[name].to(parameter) if main else torch.empty_like(parameter)
            parameter.data.copy_(broadcast(value))
        yield


@contextlib.contextmanager
def _kept_weights(run: Run) -> Iterator[None]:
    before = {name: parameter.detach().clone() for name, parameter in run.trainables.items()}
    try:
        yield
    finally:
        for name, parameter in run.trainables.items():
            parameter.data.copy_(before[name])
