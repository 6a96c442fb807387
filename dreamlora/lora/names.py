"""Names of a model's layers: diffusers' own, and those of the code that the model was published with.

The latter are those of ComfyUI, and, with "_" for ".", of kohya's files. A layer there can be several of diffusers',
one below the other (the rows of q, k and v), or one whose halves lie the other way round. No torch here: what a file
is can be told by its names alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

from dreamlora import registry

NUMBER = "{}"
"""In a name: the number of a block."""
_TABLES = "families.layers"


@dataclass(frozen=True)
class Original:
    """A layer of a model's original code, which ComfyUI has too.

    Attributes:
        name: such as "double_blocks.{}.img_attn.qkv".
        layers: diffusers' layers that it is made of, with as many numbers: their rows lie one below the other.
        rows: how many rows each of them has, or in which proportion; empty: all the same.
        swapped: the second half of its rows is the first half of diffusers' (a scale and a shift change places).
    """

    name: str
    layers: tuple[str, ...]
    rows: tuple[int, ...] = ()
    swapped: bool = False

    def rows_of(self, total: int) -> list[int]:
        """Rows of each layer.

        Args:
            total: rows of all of them.

        Raises:
            ValueError: they do not come out whole.
        """
        shares = self.rows or (1,) * len(self.layers)
        unit, rest = divmod(total, sum(shares))
        if rest:
            proportion = ":".join(map(str, shares))
            raise ValueError(f"{total} rows cannot be those of {len(shares)} layers as {proportion}")
        return [unit * share for share in shares]


class LayerPlace(NamedTuple):
    """Where a layer of diffusers' is in the original code.

    Attributes:
        original: the layer there.
        part: which of its parts.
        numbers: of blocks, in both names.
    """

    original: Original
    part: int
    numbers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the original layer."""
        return self.original.name.format(*self.numbers)

    @property
    def layers(self) -> list[str]:
        """Of diffusers, all that make up the original layer."""
        return [layer.format(*self.numbers) for layer in self.original.layers]


class LayerNames:
    """The layers of a module that can have an adapter, by either name.

    Args:
        originals: all of them.
    """

    def __init__(self, originals: Iterable[Original]) -> None:
        self.originals = tuple(originals)

    def of_layer(self, layer: str) -> LayerPlace | None:
        """The place of diffusers' layer; None: it is not known."""
        return _found(self._by_layer, layer, ".")

    def of_name(self, name: str) -> LayerPlace | None:
        """The place of the first part of an original layer; None: it is not known."""
        return _found(self._by_name, name, ".")

    def of_flat_name(self, name: str) -> LayerPlace | None:
        """The same of a name that has "_" for "."."""
        return _found(self._by_flat_name, name, "_")

    def of_flat_layer(self, layer: str) -> LayerPlace | None:
        """The place of diffusers' layer whose name has "_" for "."."""
        return _found(self._by_flat_layer, layer, "_")

    @cached_property
    def _layers(self) -> list[tuple[str, tuple[Original, int]]]:
        return [(layer, (original, part)) for original in self.originals for part, layer in enumerate(original.layers)]

    @cached_property
    def _names(self) -> list[tuple[str, tuple[Original, int]]]:
        return [(original.name, (original, 0)) for original in self.originals]

    @cached_property
    def _by_layer(self) -> _Table:
        return _table(self._layers, ".")

    @cached_property
    def _by_name(self) -> _Table:
        return _table(self._names, ".")

    @cached_property
    def _by_flat_layer(self) -> _Table:
        return _table(((flat(layer), place) for layer, place in self._layers), "_")

    @cached_property
    def _by_flat_name(self) -> _Table:
        return _table(((flat(name), place) for name, place in self._names), "_")


@dataclass(frozen=True)
class ModelNames:
    """What other programs call the parts of a model that can have adapters.

    Attributes:
        denoiser: component name: "unet" or "transformer".
        layers: of the denoiser.
        text_encoders: component names of those that can have one, and how kohya's files call them: "te", "te1", "te2".
        kohya: whose names of the denoiser's layers kohya's files have: the original ones, or diffusers'.
        comfyui: whether ComfyUI has the model; None: what it would call its layers is not known.
        one_alpha: whether kohya's files of it have one alpha for all layers: of several diffusers (0.42) loses those of
            attention.
        architecture: the model's name in ModelSpec, such as "stable-diffusion-xl-v1-base".
        implementation: ModelSpec's name of the original code.
        base_version: kohya's ``ss_base_model_version``, which Civitai and Forge tell models apart by.
    """

    denoiser: str
    layers: LayerNames
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    kohya: Literal["original", "diffusers"] | None = "original"
    comfyui: bool = True
    one_alpha: bool = False
    architecture: str = ""
    implementation: str = "diffusers"
    base_version: str = ""

    def lacking(self, form: str) -> str:
        """Why there is no file of a format of this model; empty: there is."""
        if form == "kohya" and self.kohya is None:
            return "no program of kohya's, and none that reads such files, has this model"
        if form == "comfyui" and not self.comfyui:
            return "ComfyUI does not have this model"
        return ""


def model_names(family: str, config: Mapping[str, Any]) -> ModelNames | None:
    """Names of a family's model; None: nothing is known of them.

    Args:
        family: its name.
        config: the denoiser's; of the published models where it is empty.
    """
    if family not in registry.names(_TABLES):
        return None
    names: ModelNames = registry.load(_TABLES, family).names(config)
    return names


def names_of(family: Any, config: Mapping[str, Any]) -> ModelNames:
    """The same of a family's module; diffusers' names alone, where nothing else is known."""
    found = model_names(registry.name_of(family), config)
    return found or ModelNames(family.DENOISER, LayerNames(()), kohya=None, comfyui=False)


CLIP_MODEL = "text_model."
"""Before a CLIP text encoder's layers but its projection. Not all models of transformers 5 have it, but files do."""
CLIP = LayerNames(
    Original(name, (name,))
    for name in (
        *(f"encoder.layers.{{}}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *("encoder.layers.{}.mlp.fc1", "encoder.layers.{}.mlp.fc2", "text_projection"),
    )
)
"""Layers of CLIP's text encoders, without the "text_model." that files have before most of them."""


def flat(name: str) -> str:
    """A name as kohya's files have it, where no point may be in it."""
    return name.replace(".", "_")


def renamed(pairs: Mapping[str, str], before: str = "", original_before: str = "") -> Iterator[Original]:
    """Layers that are one in both.

    Args:
        pairs: original name by diffusers'.
        before, original_before: what stands before all of them: "transformer_blocks.{}.", "double_blocks.{}.".
    """
    for layer, name in pairs.items():
        yield Original(original_before + name, (before + layer,))


def same(*names: str) -> Iterator[Original]:
    """Layers that have diffusers' names in the original code too."""
    for name in names:
        yield Original(name, (name,))


_Table: TypeAlias = dict[tuple[str, ...], list[tuple[list[str], tuple[Original, int]]]]
"""Names in words and what they stand for, by the same words without their numbers."""


def _table(named: Iterable[tuple[str, tuple[Original, int]]], point: str) -> _Table:
    """Those with the fewest numbers of blocks first: what is in a name itself counts before them."""
    table: _Table = {}
    last = {name: place for name, place in named}
    for name, place in sorted(last.items(), key=lambda one: one[0].count(NUMBER)):
        words = name.split(point)
        table.setdefault(_without_numbers(words), []).append((words, place))
    return table


def _without_numbers(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(NUMBER if word.isdecimal() else word for word in words)


def _found(table: _Table, name: str, point: str) -> LayerPlace | None:
    """What a table has for a name, any of whose numbers may be one of a block or not."""
    words = name.split(point)
    for pattern, place in table.get(_without_numbers(words), ()):
        pairs = list(zip(pattern, words, strict=True))
        if all(wanted in (NUMBER, word) for wanted, word in pairs):
            return LayerPlace(*place, tuple(word for wanted, word in pairs if wanted == NUMBER))
    return None
