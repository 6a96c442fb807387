"""What a file of adapters or weights is, told by the names and shapes of its tensors alone. No torch here.

Names say the format, and how many of the layers a family has; sizes say which of its published models. Some models have
the same names and sizes: then all of them are named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dreamlora import registry
from dreamlora.lora.names import CLIP, LayerPlace, ModelNames
from dreamlora.lora.part_names import by_layer

Shape = tuple[int, ...]
Kind = Literal["lora", "loha", "lokr", "weight"]
Certainty = Literal["certain", "likely", "unsure", "unknown"]

_KOHYA = ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_")
_WRAPPER = "base_model.model."
_COMFYUI = "diffusion_model."
_DIFFUSERS = ("unet.", "transformer.", "text_encoder")
_TEXT = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder/": "text_encoder",
    "text_encoder_2/": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
"""Components by what programs put before the names of their layers."""
_OF_DENOISER = (
    *("lora_unet_", "lora_transformer_", "lycoris_"),
    *("unet.", "transformer.", "unet/", "transformer/", "model.diffusion_model.", _COMFYUI),
)
_CLIP_MODEL = re.compile(r"^text_model[._]")
_OTHERWISE = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1$", r"\1.img_attn.\2"),
        (r"^(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2$", r"\1.txt_attn.\2"),
        (r"^(single_blocks\.\d+)\.processor\.qkv_lora$", r"\1.linear1"),
        (r"^(single_blocks\.\d+)\.processor\.proj_lora$", r"\1.linear2"),
        (r"\.processor\.(to_[qkv])_lora$", r".\1"),
        (r"\.processor\.to_out_lora$", r".to_out.0"),
    )
]
"""Names of xlabs, and of diffusers before PEFT, and what they stand for."""
_FOUND, _SURE, _NEARLY = 0.5, 0.99, 0.9
"""Shares of a file's layers: that a family must have to be named, of a sure guess, and of a likely one."""
_ALIKE = 0.02
"""Scores this near to the best are no worse."""
_NOT_ALIKE, _OF_SOME_BLOCKS = 0.5, 0.92
"""What a score is multiplied by where a model has not so many blocks, or other text encoders; and where it has more
blocks than the file."""
_EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param"}
_WIDTHS = (768, 1024, 1280, 2048, 4096)
"""Of text encoders' vectors of words."""
_MOST_WORDS = 16
_OF_CHECKPOINTS = {
    "denoiser": ("model.diffusion_model.",),
    "text encoders": ("cond_stage_model.", "conditioner.", "text_encoders."),
    "autoencoder": ("first_stage_model.", "vae."),
}
_WINDOW = 9
"""Of the convolutions that have one."""
_CLIPS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Version:
    """A published model of a family, as far as its layers tell it from others.

    Attributes:
        name: for a person.
        inputs: sizes that its denoiser's layers take.
        blocks: how many there are of each kind, by the first word of their names in diffusers.
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
class FileLayer:
    """A layer that a file has an adapter or a weight for.

    Attributes:
        name: as the file has it, with the component's.
        component: "text_encoder", ...; "": the denoiser.
        layer: its name without the component's.
        kind: of the adapter; "weight": it is the layer's own weight.
        parts: names of tensors, by PEFT's and LyCORIS' names of the factors, "alpha", "magnitude", "lora_mid".
        rows, columns: of the layer's weight ``(rows, columns, ...)``; 0: not known.
    """

    name: str
    component: str
    layer: str
    kind: Kind
    parts: Mapping[str, str]
    rows: int
    columns: int


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
    if all(name.rpartition("/")[2].startswith(_WRAPPER) for name in names):
        return "peft"
    if any(name.startswith(_COMFYUI) for name in names):
        return "comfyui"
    if any(".processor." in name and "_lora" in name for name in names):
        return "xlabs" if any(name.startswith(("double_blocks.", "single_blocks.")) for name in names) else _OLD
    if all(name.startswith(_DIFFUSERS) for name in names):
        return "diffusers"
    bare = all("." in name for name in names) and any(_models_with(re.sub(r"\.lora_.*", "", name)) for name in names)
    return "original" if bare else ""


_OLD = "diffusers (old)"


def adapter_layers(shapes: Mapping[str, Shape]) -> tuple[list[FileLayer], list[str]]:
    """Layers that have an adapter in a file, and names of tensors that are no part of one.

    Args:
        shapes: of all tensors.
    """
    found, others = by_layer(shapes)
    layers = []
    for name, parts in found.items():
        kind = _kind_of(parts)
        if kind is None:
            others.extend(parts.values())
            continue
        component, layer = _component_of(_plain(name))
        rows, columns = _sides({part: shapes[tensor] for part, tensor in parts.items()})
        layers.append(FileLayer(name, component, layer, kind, parts, rows, columns))
    return layers, others


def weight_layers(shapes: Mapping[str, Shape]) -> list[FileLayer]:
    """Layers whose own weights are in a file.

    Args:
        shapes: of all tensors; of whole models only those of the denoiser count.
    """
    layers = []
    others = tuple(prefix for part, prefixes in _OF_CHECKPOINTS.items() if part != "denoiser" for prefix in prefixes)
    (denoiser,) = _OF_CHECKPOINTS["denoiser"]
    whole = any(name.startswith(denoiser) for name in shapes)
    for name, shape in shapes.items():
        if name.startswith(others) or (whole and not name.startswith(denoiser)):
            continue
        if name.endswith(".weight") and len(shape) > 1:
            component, layer = _component_of(name.removesuffix(".weight"))
            layers.append(FileLayer(name, component, layer, "weight", {"weight": name}, shape[0], shape[1]))
    return layers


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
        named = [one for one in good if _is_named(one, metadata or {})]
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


def model_of(family: str) -> ModelNames:
    """Names of the layers of a family's published models."""
    names: ModelNames = registry.load("families.layers", family).names({})
    return names


def _component_of(name: str) -> tuple[str, str]:
    for prefix, component in _TEXT.items():
        if name.startswith(prefix):
            return component, _CLIP_MODEL.sub("", name.removeprefix(prefix).removeprefix(_WRAPPER))
    for prefix in _OF_DENOISER:
        name = name.removeprefix(prefix)
    return "", name.removeprefix(_WRAPPER)


def _plain(layer: str) -> str:
    """The name of a layer that xlabs, or diffusers before PEFT, have named otherwise."""
    for pattern, name in _OTHERWISE:
        layer = pattern.sub(name, layer)
    return layer


def _kind_of(parts: Collection[str]) -> Kind | None:
    if {"lora_A", "lora_B"} <= set(parts):
        return "lora"
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= set(parts):
        return "loha"
    halves = ("lokr_w1", "lokr_w2")
    whole = all(half in parts or {f"{half}_a", f"{half}_b"} <= set(parts) for half in halves)
    return "lokr" if whole else None


def _sides(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Rows and columns of the layer's weight; 0 where a factor is no matrix."""
    if any(len(shape) < 2 for part, shape in shapes.items() if part not in ("alpha", "magnitude")):
        return 0, 0
    if "lora_A" in shapes:
        return shapes["lora_B"][0], shapes["lora_A"][1]
    if "hada_w1_a" in shapes:
        return shapes["hada_w1_a"][1 if "hada_t1" in shapes else 0], shapes["hada_w1_b"][1]
    (a, b), (c, d) = (_half(shapes, half) for half in ("lokr_w1", "lokr_w2"))
    return a * c, b * d


def _half(shapes: Mapping[str, Shape], name: str) -> tuple[int, int]:
    if name in shapes:
        return shapes[name][0], shapes[name][1]
    core = name == "lokr_w2" and "lokr_t2" in shapes
    return shapes[f"{name}_a"][1 if core else 0], shapes[f"{name}_b"][1]


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


def _is_named(candidate: Candidate, metadata: Mapping[str, str]) -> bool:
    """Whether a header names the family, as ModelSpec and kohya call it."""
    model = model_of(candidate.family)
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    said = ((architecture, model.architecture), (metadata.get("ss_base_model_version", ""), model.base_version))
    return any(mine and theirs == mine for theirs, mine in said)


def versions_of(family: str) -> tuple[Version, ...]:
    """The published models of a family that are known."""
    if family not in registry.names("families.versions"):
        return ()
    versions: tuple[Version, ...] = registry.load("families.versions", family).VERSIONS
    return versions


def holds_embeddings(shapes: Mapping[str, Shape]) -> bool:
    """Whether a file holds vectors of new words (textual inversion) and nothing else.

    Args:
        shapes: of all tensors.
    """
    vectors = all(0 < len(shape) < 3 and shape[-1] in _WIDTHS for shape in shapes.values())
    named = shapes.keys() <= _EMBEDDINGS or (len(shapes) <= _MOST_WORDS and not any("." in name for name in shapes))
    return bool(shapes) and vectors and named


def models_of_embeddings(shapes: Mapping[str, Shape]) -> list[str]:
    """Published models whose text encoders have vectors of these sizes.

    Args:
        shapes: of all tensors of a file that ``holds_embeddings``.
    """
    widths = sorted({shape[-1] for shape in shapes.values()})
    families = registry.names("families.versions")
    return [version.name for family in families for version in versions_of(family) if widths == [*version.text_widths]]


def parts_of_model(names: Collection[str]) -> tuple[str, ...]:
    """What a file of a model's own weights holds, in words: "denoiser", "text encoders", "autoencoder"."""
    found = {part: [name for name in names if name.startswith(prefixes)] for part, prefixes in _OF_CHECKPOINTS.items()}
    rest = len(names) - sum(map(len, found.values()))
    return tuple(part for part, mine in found.items() if mine or (part == "denoiser" and rest))
