"""A LoRA at a lower rank."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from dreamlora.commands.base_model import names_of_model
from dreamlora.commands.headers import of_resized
from dreamlora.commands.kept_layers import KeptLayers
from dreamlora.commands.lora_files import bytes_at, check_lora_output, content_of, read_given, refuse_unknown_kernels
from dreamlora.commands.resize.flags import ResizeConfig
from dreamlora.config import Model
from dreamlora.lora import exporting
from dreamlora.lora.low_rank import Cut, resized, spectrum_of
from dreamlora.lora.names import ModelNames


def resize(config: ResizeConfig) -> dict[str, Any]:
    """Write the LoRA; what became of its layers, as JSON can say it.

    Raises:
        UserError: the LoRA cannot be read or written so, or something lies in the place of the output.
        WriteError: the system refused.
    """
    given = read_given(config.lora, _names(config), config.family, config.written.format)
    refuse_unknown_kernels(given)
    form = config.written.format or given.file.format
    check_lora_output(config.written, form)
    if all(adapter.kind == "lora" for own in given.weights.values() for adapter in own.values()):
        content_of(given.weights, config.written, form, given.names, {})  # what cannot be written is told at once
    kept = config.kept
    cut = Cut(kept.rank, kept.energy, kept.sv_ratio)
    layers = [(component, *item) for component, own in given.weights.items() for item in own.items()]
    found = KeptLayers()
    for component, layer, adapter in tqdm(layers, "resizing", unit="layer", delay=3, leave=False):
        spectrum = spectrum_of(adapter)
        found.add(component, layer, resized(adapter, cut, spectrum), spectrum.energy**0.5, adapter.rank)
    content = content_of(
        found.weights, config.written, form, given.names, of_resized(given.file.metadata, found.weights)
    )
    exporting.save(config.written.output, form, content)
    return {
        "lora": str(given.file.path),
        "output": str(config.written.output),
        "format": form,
        **found.summary(),
        "bytes_before": sum(map(bytes_at, given.file.files.values())),
        "bytes": bytes_at(config.written.output),
    }


def _names(config: ResizeConfig) -> ModelNames | None:
    """Of the base model's layers; None: none is given."""
    if config.pretrained_model_name_or_path is None:
        return None
    return names_of_model(
        Model(
            pretrained_model_name_or_path=config.pretrained_model_name_or_path,
            family=config.family,
            revision=config.revision,
            cache_dir=config.cache_dir,
        )
    )
