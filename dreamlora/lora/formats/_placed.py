"""Adapters under the names of a model's original code: layers there are stacks of diffusers' layers, or swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from dreamlora.lora.formats import FileContent, _factors, _stacks
from dreamlora.lora.names import LayerNames, LayerPlace, ModelNames
from dreamlora.lora.weights import AdapterWeights, LayerWeights

Place: TypeAlias = LayerPlace | tuple[str, str]
"""Of a layer: in the original code, or component and name in diffusers and transformers."""


def unnamed(component: str, model: ModelNames) -> ValueError:
    """The error of a part that a model of this family lacks, or that other programs have no LoRAs for."""
    parts = ", ".join((model.denoiser, *model.text_encoders))
    return ValueError(
        f"there are no names for the {component}, only for the {parts}: is the LoRA for a model of another family?"
    )


def gathered(content: FileContent, denoiser: str, place_of: Callable[[str], Place]) -> AdapterWeights:
    """All adapters of a file.

    Args:
        content: of it.
        denoiser: the component that original layers are of.
        place_of: the component and layer that a name in the file means, or where that is in the original code; raises
            ValueError for a name that it does not know.

    Raises:
        ValueError: see ``Format.read``.
    """
    adapters: AdapterWeights = {}
    places: list[tuple[LayerPlace, LayerWeights]] = []
    for name, factors in _factors.by_layer(content.tensors).items():
        adapter, place = _factors.weights_of(name, factors), place_of(name)
        if isinstance(place, LayerPlace):
            places.append((place, adapter))
        else:
            component, layer = place
            adapters.setdefault(component, {})[layer] = adapter
    for layer, adapter in unplaced(places):
        adapters.setdefault(denoiser, {})[layer] = adapter
    return adapters


def placed(weights: Mapping[str, LayerWeights], names: LayerNames) -> Iterator[tuple[str, LayerWeights]]:
    """Adapters of a model by the names of the original code.

    Raises:
        ValueError: a layer has no name there, or they cannot be one where the original code has one layer.
    """
    parts: dict[str, tuple[LayerPlace, dict[str, LayerWeights]]] = {}
    for layer, adapter in weights.items():
        place = names.of_layer(layer)
        if place is None:
            raise ValueError(f"{layer} has no name there")
        parts.setdefault(place.name, (place, {}))[1][layer] = adapter
    for name, (place, adapters) in parts.items():
        try:
            yield name, _joined(place, adapters)
        except ValueError as error:
            raise ValueError(f"{' and '.join(adapters)}: {error}") from None


def unplaced(adapters: Iterable[tuple[LayerPlace, LayerWeights]]) -> Iterator[tuple[str, LayerWeights]]:
    """Adapters of diffusers' layers; ``placed`` the other way.

    Args:
        adapters: of original layers.

    Raises:
        ValueError: their rows cannot be those of the layers.
    """
    for place, adapter in adapters:
        whole = _stacks.swapped(adapter) if place.original.swapped else adapter
        layers = place.layers
        if len(layers) == 1:
            yield layers[0], whole
            continue
        try:
            parts = _stacks.parted(whole, place.original.rows_of(whole.rows))
        except ValueError as error:
            raise ValueError(f"{place.name}: {error}") from None
        for layer, part in zip(layers, parts, strict=True):
            if part is not None:
                yield layer, part


def _joined(place: LayerPlace, adapters: Mapping[str, LayerWeights]) -> LayerWeights:
    layers = place.layers
    shares = place.original.rows or (1,) * len(layers)
    first = next(iter(adapters))
    unit = adapters[first].rows // shares[layers.index(first)]
    whole = _stacks.stacked([adapters.get(layer) for layer in layers], [unit * share for share in shares])
    return _stacks.swapped(whole) if place.original.swapped else whole
