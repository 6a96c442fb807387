"""A frozen LoRA beside the one that trains: it is active while that trains, and off in whatever shows the result.

For models that were distilled to few steps: what plain training would undo, the assistant undoes before, so that the
LoRA that is trained learns its images alone, and goes into the distilled model without the assistant.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dreamlora.lora.files import LoraFactors, put_adapter
from dreamlora.lora.pairs import ADAPTER, bare

ASSISTANT = "assistant"
"""Name of the adapter. PEFT finds what belongs to an adapter by its name, which must not be in another's."""


def add_assistant(module: nn.Module, name: str, factors: LoraFactors) -> None:
    """Put a LoRA beside the one that trains, and switch it on.

    Args:
        module: with the adapter that trains.
        name: of the module in the pipeline that the factors are for.
        factors: of ``files.factors_of``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        put_adapter(module, factors.parts[name], factors.alphas[name], ASSISTANT)
    for layer in _layers(module):
        layer.set_scale(ASSISTANT, 1.0)
    switch(module, on=True)


def switch(module: nn.Module, *, on: bool) -> None:
    """Switch the assistant on or off, if there is one; what trains goes on training."""
    if ASSISTANT not in getattr(bare(module), "peft_config", {}):
        return
    for layer in _layers(module):
        layer.set_adapter([ADAPTER, ASSISTANT] if on else [ADAPTER])
        for factor in (layer.lora_A, layer.lora_B):  # PEFT would train all that is active
            if ASSISTANT in factor:
                factor[ASSISTANT].requires_grad_(False)


@contextmanager
def without_assistant(module: nn.Module) -> Iterator[None]:
    """The model in here is the one that the result is for; afterwards the assistant is on again."""
    switch(module, on=False)
    try:
        yield
    finally:
        switch(module, on=True)


def _layers(module: nn.Module) -> Iterator[LoraLayer]:
    yield from (layer for layer in bare(module).modules() if isinstance(layer, LoraLayer))
