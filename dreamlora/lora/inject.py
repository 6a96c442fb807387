"""LoRA adapters put into a model by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from torch import nn

from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.lora.fused import fuse
from dreamlora.lora.pairs import ADAPTER

EVERY_LINEAR = "all-linear"
EVERY_LAYER = "all"


def add_lora(module: Any, lora: Lora, layers: Sequence[str]) -> None:
    """Add a trainable LoRA, always fp32, to a diffusers or transformers model; freeze the rest.

    lora_B is zero, lora_A as PEFT draws it; how a run starts is up to ``training.start``.

    Args:
        module: the model; it must have ``add_adapter``.
        lora: rank, alpha and dropout; a rank above a layer's size is kept, as PEFT keeps it.
        layers: ends of layer names; or "all-linear", or "all": every Linear (and Conv2d) inside the numbered blocks, so
            not conv_in, conv_out and the embeddings of times and pooled prompts.

    Raises:
        UserError: a name that no Linear or Conv2d ends in.
    """
    targets = target_layers(module, layers)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.lora_alpha is None else lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
    )
    try:
        module.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise UserError(f"--lora_layers {' '.join(layers)}: PEFT cannot adapt these layers: {error}") from error
    for parameter in trainable_parameters(module).values():
        parameter.data = parameter.data.float()
    fuse(module)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: lora_A and lora_B of every adapted layer."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def target_layers(module: nn.Module, layers: Sequence[str]) -> list[str]:
    """What PEFT is told: ``layers`` once each of them fits something; or full names for "all" and "all-linear", and
    where an end fits something else too: FLUX.2's to_out is a layer in some blocks, a list in others.

    Raises:
        UserError: a name fits nothing; the message gives names that exist.
    """
    adaptable = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not {EVERY_LAYER, EVERY_LINEAR}.isdisjoint(layers):
        wanted = nn.Linear | nn.Conv2d if EVERY_LAYER in layers else nn.Linear
        return [name for name in adaptable if _in_block(name) and isinstance(module.get_submodule(name), wanted)]
    for layer in layers:
        if not any(_fits(name, layer) for name in adaptable):
            raise UserError(
                f"--lora_layers: no Linear or Conv2d of {type(module).__name__} has a name that ends in {layer!r}. "
                f'There are {_examples(adaptable)}; or give "{EVERY_LINEAR}" or "{EVERY_LAYER}".'
            )
    fitting = [name for name, _ in module.named_modules() if any(_fits(name, layer) for layer in layers)]
    return list(layers) if set(fitting) <= set(adaptable) else [name for name in fitting if name in set(adaptable)]


def _fits(name: str, layer: str) -> bool:
    """Whether a layer's name ends so."""
    return name == layer or name.endswith("." + layer)


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _examples(names: Sequence[str]) -> str:
    """The commonest last parts of names; a number is no name, so it takes the part before it along."""
    counts: dict[str, int] = {}
    for name in filter(_in_block, names):
        parts = name.split(".")
        end = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
        counts[end] = counts.get(end, 0) + 1
    return ", ".join(sorted(counts, key=lambda end: (-counts[end], end))[:12])
