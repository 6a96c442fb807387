"""Several LoRAs into one: all of their ranks, or the best approximation of their sum."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from dreamlora.commands.headers import of_sum
from dreamlora.commands.kept_layers import KeptLayers
from dreamlora.commands.lora_files import (
    Given,
    bytes_at,
    check_lora_output,
    content_of,
    read_given,
    refuse_unknown_kernels,
)
from dreamlora.commands.merge.flags import MergeConfig
from dreamlora.errors import UserError
from dreamlora.lora import exporting
from dreamlora.lora.low_rank import Cut, Kept, resized, spectrum_of
from dreamlora.lora.merging import Weighted, concatenated
from dreamlora.lora.names import ModelNames
from dreamlora.lora.weights import LayerWeights


def merge_together(config: MergeConfig) -> dict[str, Any]:
    """See ``merge.merge``."""
    loras = _read(config)
    form = config.written.format or loras[0].file.format
    check_lora_output(config.written, form)
    sums = _sums(loras, config.strengths)
    names = next((lora.names for lora in loras if lora.names), None)
    # what the format cannot hold is told before anything is decomposed
    whole = KeptLayers()
    for (component, layer), adapter in sums.items():
        whole.weights.setdefault(component, {})[layer] = adapter
    content_of(whole.weights, config.written, form, names, {})
    kept, cut = KeptLayers(), Cut(config.kept.rank, config.kept.energy, config.kept.sv_ratio)
    for (component, layer), adapter in tqdm(sums.items(), "merging", unit="layer", delay=3, leave=False):
        spectrum = spectrum_of(adapter)
        found = resized(adapter, cut, spectrum) if config.kept.given else Kept(adapter, 1.0, 0.0)
        kept.add(component, layer, found, spectrum.energy**0.5, adapter.rank)
    parts = [(lora.label, strength) for lora, strength in zip(loras, config.strengths, strict=True)]
    metadata = of_sum(config.written.output, [lora.file.metadata for lora in loras], parts)
    exporting.save(config.written.output, form, content_of(kept.weights, config.written, form, names, metadata))
    return {
        "loras": [{"name": name, "strength": strength} for name, strength in parts],
        "output": str(config.written.output),
        "format": form,
        **kept.summary(),
        "bytes": bytes_at(config.written.output),
    }


def _read(config: MergeConfig) -> list[Given]:
    """All LoRAs; names of layers that one tells are those of all."""
    names: ModelNames | None = None
    loras: list[Given] = []
    for path in config.lora:
        loras.append(read_given(path, names, config.family, config.written.format))
        refuse_unknown_kernels(loras[-1])
        names = names or loras[-1].names
    return loras


def _sums(loras: list[Given], strengths: tuple[float, ...]) -> dict[tuple[str, str], LayerWeights]:
    """Of each layer all LoRAs as one.

    Raises:
        UserError: one is a DoRA, or they are for models of other sizes.
    """
    layers: dict[tuple[str, str], list[tuple[Given, Weighted]]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        for component, own in lora.weights.items():
            for layer, adapter in own.items():
                layers.setdefault((component, layer), []).append((lora, (adapter, strength)))
    sums = {}
    for (component, layer), adapters in layers.items():
        try:
            sums[component, layer] = concatenated([weighted for _, weighted in adapters])
        except ValueError as error:
            several = " and ".join(lora.label for lora, _ in adapters)
            raise UserError(f"{several} cannot become one LoRA: in {component}.{layer}: {error}") from None
    return sums
