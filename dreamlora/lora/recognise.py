"""Which format and which model a file of adapters or weights is of, by names and shapes alone. No torch here.

Names say the format, and how many of the layers a family has; sizes say which of its published models. Some models have
the same names and sizes: then all of them are named.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dreamlora import registry
from dreamlora.lora.file_layers import COMFYUI, WRAPPER, FileLayer, Shape
from dreamlora.lora.names import CLIP, LayerPlace, ModelNames

Certainty = Literal["certain", "likely", "unsure", "unknown"]

_KOHYA = ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_")
_DIFFUSERS = ("unet.", "transformer.", "text_encoder")
_OLD = "diffusers (old)"
_FOUND, _SURE, _NEARLY = 0.5, 0.99, 0.9
"""Shares of a file's layers: that a family must have to be named, of a sure guess, and of a likely one."""
_ALIKE = 0.02
"""Scores this near to the best are no worse."""
_NOT_ALIKE, _OF_SOME_BLOCKS = 0.5, 0.92
"""What a score is multiplied by where a model has not so many blocks, or other text encoders; and where it has more
blocks than the file."""
_WINDOW = 9
"""Of the convolutions that have one."""
_CLIPS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Version:
    """A published model of a family, as far as its layers tell it from others.

    Attributes:
        name: for a person.
        inputs: sizes that its denoiser's layers take.
        blocks: how many there are of each kind, by the word before their number in names of diffusers.
        layers: of the denoiser that can have an adapter, in diffusers.
        text_widths: of the text encoders that can have one.
        lacks: words in names of layers that other models of the family have.
    """

    name: str
    inputs: tuple[int, ...]
    blocks: Mapping[str, int]
    layers: int
    text_widths: tuple[int, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A family that a file may be for.

    Attributes:
        family: its name.
        denoiser: component name of it.
        known: share of the file's layers of the denoiser that it has by name.
        versions: its published models that fit best; empty: none does.
        fit: how well sizes and numbers of blocks are those of the best of them, from 0 to 1.
        score: of both, from 0 to 1.
    """

    family: str
    denoiser: str
    known: float
    versions: tuple[Version, ...]
    fit: float
    score: float


@dataclass(frozen=True)
class Guess:
    """Which family a file is for.

    Attributes:
        candidates: best first; empty: it is none that is known.
        certainty: "certain": names and sizes are those of one family alone; "likely": nearly so, or its header decides;
            "unsure": those of several, or of no published model.
    """

    candidates: tuple[Candidate, ...] = ()
    certainty: Certainty = "unknown"


def format_of(names: Collection[str]) -> str:
    """Name of the format that tensors of adapters are of.

    Args:
        names: of these tensors.

    Returns:
        One of ``lora.formats``; or "xlabs", "diffusers (old)", "original" (names of the model's original code and
        nothing before them), which diffusers' converters read; or "": none that is known.
    """
    if not names:
        return ""
    if all(name.startswith(_KOHYA) for name in names):
        return "kohya"
    if all(name.rpartition("/")[2].startswith(WRAPPER) for name in names):
        return "peft"
    if any(name.startswith(COMFYUI) for name in names):
        return "comfyui"
    if any(".processor." in name and "_lora" in name for name in names):
        return "xlabs" if any(name.startswith(("double_blocks.", "single_blocks.")) for name in names) else _OLD
    if all(name.startswith(_DIFFUSERS) for name in names):
        return "diffusers"
    bare = all("." in name for name in names) and any(_models_with(re.sub(r"\.lora_.*", "", name)) for name in names)
    return "original" if bare else ""


def guess_family(layers: Sequence[FileLayer], metadata: Mapping[str, str] | None = None) -> Guess:
    """The family that a file is for.

    Args:
        layers: that it has something for.
        metadata: of its header, which decides between families whose layers are the same.
    """
    text = _text_widths(layers)
    of_denoiser = [layer for layer in layers if not layer.component]
    if not of_denoiser and not text:
        return Guess()
    candidates = [_candidate(family, of_denoiser, text) for family in registry.names("families.layers")]
    best = max(candidate.score for candidate in candidates)
    good = [one for one in candidates if one.score >= best - _ALIKE and one.known >= _FOUND]
    good.sort(key=lambda one: (-one.score, -max((version.layers for version in one.versions), default=0)))
    if len(good) > 1:
        said = named_families(metadata or {})
        named = [one for one in good if one.family in said]
        return Guess((named[0],), "likely") if len(named) == 1 else Guess(tuple(good), "unsure")
    if not good:
        return Guess()
    (one,) = good
    if one.known >= _SURE and one.fit >= _SURE:
        return Guess((one,), "certain")
    return Guess((one,), "likely" if one.known >= _NEARLY and one.fit >= _NEARLY else "unsure")


def place_of(model: ModelNames, layer: str) -> tuple[LayerPlace, bool] | None:
    """Where a layer of the denoiser is, whichever names the file has, and whether these are the original code's.

    Args:
        model: names of its layers.
        layer: without the component's name.
    """
    names = model.layers
    place = names.of_layer(layer) or names.of_flat_layer(layer)
    if place:
        return place, False
    place = names.of_name(layer) or names.of_flat_name(layer)
    return (place, True) if place else None


def is_known_text_layer(layer: str) -> bool:
    """Whether it is one of CLIP's text encoders, by either spelling."""
    return bool(CLIP.of_layer(layer) or CLIP.of_flat_layer(layer))


def _models_with(layer: str) -> bool:
    return any(place_of(model_of(family), layer) for family in registry.names("families.layers"))


@functools.cache
def model_of(family: str) -> ModelNames:
    """Names of the layers of a family's published models."""
    names: ModelNames = registry.load("families.layers", family).names({})
    return names


def _text_widths(layers: Sequence[FileLayer]) -> dict[str, set[int]]:
    """What layers of text encoders take, by component; the last ones of MLPs, which take more, are left out."""
    widths: dict[str, set[int]] = {}
    for layer in layers:
        if layer.component and is_known_text_layer(layer.layer) and not layer.layer.endswith("fc2"):
            widths.setdefault(layer.component, set()).add(layer.columns)
    return widths


def _candidate(family: str, layers: Sequence[FileLayer], text: Mapping[str, set[int]]) -> Candidate:
    model = model_of(family)
    placed = [(place[0], layer) for layer in layers if (place := place_of(model, layer.layer))]
    known = len(placed) / len(layers) if layers else 1.0
    if text.keys() - model.text_encoders.keys():
        known *= _NOT_ALIKE if layers else 0
    fits = {version.name: (_fit(version, placed, text), version) for version in versions_of(family)}
    best = max((fit for fit, _ in fits.values()), default=0.0)
    versions = tuple(version for fit, version in fits.values() if fit >= max(best, _NEARLY))
    return Candidate(family, model.denoiser, known, versions, best, known * (1 + best) / 2)


def _fit(version: Version, placed: Sequence[tuple[LayerPlace, FileLayer]], text: Mapping[str, set[int]]) -> float:
    """How well sizes and numbers of blocks are those of a model, from 0 to 1."""
    fit = sum(_takes(layer, version) for _, layer in placed) / len(placed) if placed else 1.0
    used = _blocks(place for place, _ in placed)
    if version.lacks and any(set(version.lacks) & set(_words(place)) for place, _ in placed):
        fit *= _NOT_ALIKE
    counts = [(used[word], count) for word, count in version.blocks.items() if word in used]
    if any(most > count for most, count in counts):
        fit *= _NOT_ALIKE
    elif any(most < count for most, count in counts):
        fit *= _OF_SOME_BLOCKS
    expected = dict(zip(_CLIPS, version.text_widths, strict=False))
    agree = all(widths == {expected.get(component, 0)} for component, widths in text.items())
    return fit if agree else fit * _NOT_ALIKE


def _takes(layer: FileLayer, version: Version) -> bool:
    """Whether one of the model's layers has these columns; of a LoHa or LoKr of a convolution they may be all of its
    window's."""
    whole = layer.columns % _WINDOW == 0 and layer.kind in ("loha", "lokr")
    return layer.columns in version.inputs or (whole and layer.columns // _WINDOW in version.inputs)


def _blocks(places: Iterable[LayerPlace]) -> dict[str, int]:
    """How many blocks of each kind there are at least: by the word before a number in names of layers."""
    most: dict[str, int] = {}
    for place in places:
        for word, number in pairwise(_words(place)):
            if number.isdecimal():
                most[word] = max(most.get(word, 0), int(number) + 1)
    return most


def _words(place: LayerPlace) -> list[str]:
    return place.layers[place.part].split(".")


def named_families(metadata: Mapping[str, str]) -> list[str]:
    """Those that a header names, as ModelSpec and kohya call their models."""
    architecture, version = metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", "")
    said = {architecture.partition("/")[0], version} - {""}
    models = {family: model_of(family) for family in registry.names("families.layers")}
    return [family for family, model in models.items() if {model.architecture, model.base_version} & said]


def versions_of(family: str) -> tuple[Version, ...]:
    """The published models of a family that are known."""
    if family not in registry.names("families.versions"):
        return ()
    versions: tuple[Version, ...] = registry.load("families.versions", family).VERSIONS
    return versions


def models_of_embeddings(shapes: Mapping[str, Shape]) -> list[str]:
    """Published models whose text encoders have vectors of these sizes.

    Args:
        shapes: of all tensors of a file that ``holds_embeddings``.
    """
    widths = sorted({shape[-1] for shape in shapes.values()})
    families = registry.names("families.versions")
    return [version.name for family in families for version in versions_of(family) if widths == [*version.text_widths]]
