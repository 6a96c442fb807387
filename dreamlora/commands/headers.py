"""What LoRAs and models that are made of others say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dreamlora.lora.metadata import DATE, IMPLEMENTATION, SPEC, SPEC_VERSION, carried, now
from dreamlora.lora.names import ModelNames
from dreamlora.lora.weights import AdapterWeights

MERGED_FROM = "modelspec.merged_from"
_TRIGGER = "modelspec.trigger_phrase"
_OF_THE_MODEL = (
    *(SPEC, "modelspec.architecture", IMPLEMENTATION, "modelspec.prediction_type", "modelspec.resolution"),
    *("ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_v2"),
)
"""Entries that are true of all LoRAs of a base model."""


def of_resized(metadata: Mapping[str, str], weights: AdapterWeights) -> dict[str, str]:
    """Of a LoRA at another rank: what it said before, with its new rank and alpha where it told them.

    Args:
        metadata: of the LoRA that it was.
        weights: as they are now.
    """
    own = carried(metadata)
    adapters = [adapter for layers in weights.values() for adapter in layers.values()]
    for key, values in (("dim", {a.rank for a in adapters}), ("alpha", {a.alpha for a in adapters})):
        if f"ss_network_{key}" in own:  # the word for several is that of kohya's resize_lora.py
            own[f"ss_network_{key}"] = str(next(iter(values))) if len(values) == 1 else "Dynamic"
    return own


def of_sum(output: Path, headers: Sequence[Mapping[str, str]], parts: Sequence[tuple[str, float]]) -> dict[str, str]:
    """Of a LoRA that is a sum: of the base model what the first says, and all trigger phrases.

    Args:
        output: its file.
        headers: of the LoRAs.
        parts: their names and strengths.
    """
    own = {key: headers[0][key] for key in _OF_THE_MODEL if key in headers[0]}
    triggers = dict.fromkeys(header[_TRIGGER] for header in headers if header.get(_TRIGGER))
    if IMPLEMENTATION in own:
        own |= {"modelspec.title": output.stem, DATE: now()}
    return {**own, **({_TRIGGER: ", ".join(triggers)} if triggers else {}), MERGED_FROM: _sum(parts)}


def of_extracted(output: Path, names: ModelNames, base: str, tuned: str) -> dict[str, str]:
    """Of a LoRA that is the difference of two models.

    Args:
        output: its file.
        names: of the models' layers.
        base, tuned: names of the models, without folders.
    """
    return {
        SPEC: SPEC_VERSION,
        "modelspec.architecture": f"{names.architecture}/lora",
        IMPLEMENTATION: "diffusers",
        "modelspec.title": output.stem,
        DATE: now(),
        "ss_base_model_version": names.base_version,
        MERGED_FROM: f"{tuned} - {base}",
    }


def of_model(metadata: Mapping[str, str], parts: Sequence[tuple[str, float]]) -> dict[str, str]:
    """Of a model's file with LoRAs in it: what it said before, but for hashes, and what was merged, and before that.

    Args:
        metadata: of the model's file; a plain "format" stays.
        parts: names and strengths of the LoRAs.
    """
    own = {**carried(metadata), **({"format": metadata["format"]} if "format" in metadata else {})}
    before = [own[MERGED_FROM]] if own.get(MERGED_FROM) else []
    return {**own, MERGED_FROM: ", ".join([*before, _sum(parts)])}


def _sum(parts: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} x {strength:g}" for name, strength in parts)
