"""A frozen LoRA beside the one that trains: it is active while that trains, and off in whatever shows the result.

For models that were distilled to few steps: what plain training would undo, the assistant undoes before, so that the
LoRA that is trained learns its images alone, and goes into the distilled model without the assistant.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dreamlora.lora.applying import put_adapter
from dreamlora.lora.merging import added
from dreamlora.lora.pairs import ADAPTER, bare, device_of
from dreamlora.lora.weights import LayerWeights, lora_weights
from dreamlora.precision import dense_weight

ASSISTANT = "assistant"
"""Name of the adapter. PEFT finds what belongs to an adapter by its name, which must not be in another's."""


def add_assistant(module: nn.Module, weights: Mapping[str, LayerWeights]) -> None:
    """Put a LoRA beside the one that trains, and switch it on.

    Args:
        module: with the adapter that trains.
        weights: by layer, of ``as_loras``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        put_adapter(module, weights, ASSISTANT)
    for layer in _layers(module):
        layer.set_scale(ASSISTANT, 1.0)
    switch(module, on=True)


def as_loras(module: nn.Module, weights: Mapping[str, LayerWeights]) -> dict[str, LayerWeights]:
    """Adapters as LoRAs, which several of can be in one layer: what is none becomes its whole ΔW times ones.

    Args:
        module: that they are for, without adapters.
        weights: by layer.
    """
    return {
        name: each if each.kind == "lora" and each.magnitude is None else _as_lora(module, name, each)
        for name, each in weights.items()
    }


def _as_lora(module: nn.Module, name: str, weights: LayerWeights) -> LayerWeights:
    base = dense_weight(module.get_submodule(name), torch.float32, device_of(module)).detach()
    change = added(base, [(weights, 1.0)]) - base
    rows, columns = change.shape[:2]
    if change.ndim == 2 and columns < rows:
        return lora_weights(torch.eye(columns), change)
    return lora_weights(change, torch.eye(rows).reshape(rows, rows, *(1 for _ in change.shape[2:])))


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
