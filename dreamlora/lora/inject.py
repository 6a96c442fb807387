"""Adapters put into a model by PEFT."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from dreamlora import registry
from dreamlora.adapters._scale import Scale
from dreamlora.cli.parse import method_options
from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.lora.applying import put_adapter
from dreamlora.lora.fused import fuse
from dreamlora.lora.pairs import ADAPTER, device_of, reset_magnitudes, tuned_layers
from dreamlora.lora.targets import alpha_of, layer_names, patterns, rank_of, target_layers
from dreamlora.lora.weights import LayerWeights


def add_lora(module: Any, lora: Lora, layers: Sequence[str], part: str = "") -> None:
    """Add a trainable adapter, always fp32, to a diffusers or transformers model; freeze the rest.

    It has no effect, and its numbers are those that PEFT draws; how a run starts is up to ``training.start``.

    Args:
        module: the model; it must have ``add_adapter``.
        lora: kind, ranks, alphas and dropout; a rank above a layer's size is kept, as PEFT keeps it.
        layers: see ``targets.layer_names``.
        part: the model's name in its pipeline, for patterns of ranks and alphas.

    Raises:
        UserError: a name that no Linear or Conv2d ends in; or layers that this kind cannot adapt.
    """
    targets = target_layers(module, layers, lora.lora_blocks)
    kind = registry.load("adapters", lora.adapter)
    names = layer_names(module, layers, lora.lora_blocks)
    if lora.adapter == "dora":
        _refuse_groups(module, names)
    options = method_options("adapters", lora.adapter, lora.adapter_args, {})
    try:
        module.add_adapter(kind.config(_scale(lora, part, names), targets, options), adapter_name=ADAPTER)
    except ValueError as error:
        raise UserError(f"--lora_layers {' '.join(layers)}: PEFT cannot adapt these layers: {error}") from error
    module.to(device_of(module))  # PEFT puts an adapter where its layer waits
    for parameter in trainable_parameters(module).values():
        parameter.data = parameter.data.float()
    reset_magnitudes(module)
    fuse(module)


def go_on(module: Any, weights: Mapping[str, LayerWeights], new: Collection[str], dropout: float) -> None:
    """Add a trainable adapter with these factors, as ``add_lora`` adds one without effect.

    Args:
        module: the model.
        weights: by layer; all of the same kind.
        new: layers whose adapter has no effect yet.
        dropout: probability that an input of lora_A is dropped.
    """
    put_adapter(module, weights, dropout=dropout)
    for layer in tuned_layers(module):
        layer.layer.set_scale(ADAPTER, 1.0)
        for parameter in layer.parameters.values():
            parameter.requires_grad_(True)
        if layer.name in new and layer.pair:
            layer.pair.reset_magnitude()
    fuse(module)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: those of the adapter of every adapted layer."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _scale(lora: Lora, part: str, names: Sequence[str]) -> Scale:
    ranks = {name: rank_of(lora, part, name) for name in names}
    alphas = {name: alpha_of(lora, part, name) for name in names}
    alpha = float(lora.rank) if lora.lora_alpha is None else lora.lora_alpha
    return Scale(
        rank=lora.rank,
        alpha=alpha,
        ranks=patterns(ranks, lora.rank),
        alphas=patterns(alphas, alpha),
        root=lora.use_rslora,
        dropout=lora.lora_dropout,
    )


def _refuse_groups(module: nn.Module, names: Sequence[str]) -> None:
    grouped = [name for name in names if getattr(module.get_submodule(name), "groups", 1) > 1]
    if grouped:
        raise UserError(
            f"--adapter dora: {grouped[0]} is a convolution in groups, for which PEFT has no DoRA: leave it out of "
            "--lora_layers, or use another --adapter"
        )
