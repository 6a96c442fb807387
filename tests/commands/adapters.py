"""Adapters of every kind for the layers of a stock pipeline, and files of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamlora import registry
from dreamlora.lora.names import CLIP, ModelNames
from dreamlora.lora.saving import save_content
from dreamlora.lora.weights import AdapterWeights, Kind, LayerWeights, lora_weights


def names_of(stock: Any, family: str) -> ModelNames:
    denoiser = getattr(stock, registry.load("families", family).DENOISER)
    names: ModelNames = registry.load("families.layers", family).names(dict(denoiser.config))
    return names


def adaptable(stock: Any, names: ModelNames) -> dict[str, dict[str, nn.Module]]:
    """Layers by component and name that can have an adapter in all formats."""
    tables = {names.denoiser: names.layers, **dict.fromkeys(names.text_encoders, CLIP)}
    return {
        component: {
            name.removeprefix("text_model."): layer
            for name, layer in getattr(stock, component).named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and table.of_layer(name.removeprefix("text_model."))
        }
        for component, table in tables.items()
    }


def drawn(stock: Any, names: ModelNames, seed: int = 0, kind: Kind | str = "lora", size: float = 0.1) -> AdapterWeights:
    """An adapter for each layer, ranks and alphas of which differ."""
    draw = torch.Generator().manual_seed(seed)
    return {
        component: {
            name: _drawn(tuple(layer.weight.shape), number, kind, draw, size)
            for number, (name, layer) in enumerate(layers.items())
        }
        for component, layers in adaptable(stock, names).items()
    }


def _drawn(shape: tuple[int, ...], number: int, kind: str, draw: torch.Generator, size: float) -> LayerWeights:
    def some(*sides: int) -> Tensor:
        return torch.randn(*sides, generator=draw) * size**0.5

    rank, alpha = 1 + number % 3, [1.0, 2.5, 4.0][number % 3]
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    if kind == "loha":
        factors = {f"hada_w{i}_{side}": some(*sides) for i in (1, 2) for side, sides in _pair(rows, columns, rank)}
        return LayerWeights("loha", factors, alpha)
    if kind == "lokr":
        return LayerWeights("lokr", {"lokr_w1": some(2, 1), "lokr_w2": some(rows // 2, *shape[1:])}, 1.0)
    lora = lora_weights(some(rank, *shape[1:]), some(rows, rank, *(1 for _ in shape[2:])), alpha)
    return replace(lora, magnitude=some(rows).abs() * 2) if kind == "dora" else lora


def _pair(rows: int, columns: int, rank: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("a", (rows, rank)), ("b", (rank, columns))


def save(file: Path, weights: AdapterWeights, names: ModelNames, form: str = "diffusers") -> Path:
    return save_content(file, registry.load("lora.formats", form).write(weights, names))


def changed(weight: Tensor, adapter: LayerWeights, strength: float) -> Tensor:
    """ΔW of a layer in float64, by its definition."""
    precise = adapter.in_precision(torch.float64)
    base = weight.double()
    delta = strength * precise.delta().reshape(base.shape)
    if precise.magnitude is None:
        return delta
    rows = (base + delta).flatten(1)
    return (precise.magnitude[:, None] * rows / rows.norm(dim=1, keepdim=True)).reshape(base.shape) - base


def merged_by_hand(stock: Any, names: ModelNames, loras: Mapping[int, tuple[AdapterWeights, float]]) -> dict[str, Any]:
    """Weights in float64 by component and layer."""
    return {
        component: {
            name: layer.weight.detach().double()
            + sum(
                changed(layer.weight.detach(), weights[component][name], strength)
                for weights, strength in loras.values()
                if name in weights.get(component, {})
            )
            for name, layer in layers.items()
        }
        for component, layers in adaptable(stock, names).items()
    }
