"""Which layers are adapted, with which rank and alpha: by parts of their names, as a person gives them.

A *place* stands for layers: some parts of a name in a row, between its dots. A part may be ``*``, or a range of numbers
such as ``7-12``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.interfaces import Family

EVERY_LINEAR = "all-linear"
EVERY_LAYER = "all"

_Value = TypeVar("_Value", int, float)


def wanted_layers(lora: Lora, family: Family) -> tuple[str, ...]:
    """What ``--lora_layers`` means for the denoiser of a family: ends of names, or "all", or "all-linear"."""
    names = lora.lora_layers or family.LORA_LAYERS
    return tuple(dict.fromkeys(end for name in names for end in family.LORA_PRESETS.get(name, (name,))))


def layer_names(module: nn.Module, layers: Sequence[str], blocks: Collection[str] = ()) -> list[str]:
    """Names of the layers to adapt, in module order.

    Args:
        layers: ends of names; or "all-linear", or "all": every Linear (and Conv2d) inside the numbered blocks, so not
            conv_in, conv_out and the embeddings of times and pooled prompts.
        blocks: of ``--lora_blocks``; none for all.

    Raises:
        UserError: a name that no Linear or Conv2d ends in, or a block without a layer; the message gives some that
            exist.
    """
    found = list(_of_kind(module, layers))
    for block in blocks:
        if not any(_lies_in(block, name) for name in found):
            raise UserError(
                f"--lora_blocks: no layer of {type(module).__name__} that --lora_layers names lies in {block!r}. They "
                f"lie in {_block_examples(found)}"
            )
    return [name for name in found if any(_lies_in(block, name) for block in blocks)] if blocks else found


def target_layers(module: nn.Module, layers: Sequence[str], blocks: Collection[str] = ()) -> list[str]:
    """What PEFT is told: ``layers`` where all that fits them is meant, full names else. For instance FLUX.2's to_out is
    a layer in some blocks, a list in others.

    Raises:
        UserError: see ``layer_names``.
    """
    names = layer_names(module, layers, blocks)
    fitting = {name for name, _ in module.named_modules() if any(_ends_in(layer, name) for layer in layers)}
    plain = not any(_is_special(part) for layer in layers for part in layer.split("."))
    return list(layers) if plain and fitting == set(names) else names


def rank_of(lora: Lora, part: str, layer: str) -> int:
    """Rank of a layer of a part of the pipeline: the first pattern that fits counts."""
    return _first_fit(lora.ranks, part, layer) or lora.rank


def alpha_of(lora: Lora, part: str, layer: str) -> float:
    """Alpha of a layer: a pattern's, else the one that was given for all, else its rank."""
    given = _first_fit(lora.alphas, part, layer) or lora.lora_alpha
    return float(rank_of(lora, part, layer) if given is None else given)


def require_patterns(lora: Lora, names: Mapping[str, Sequence[str]]) -> None:
    """Nothing, if every pattern of ranks and alphas fits a layer.

    Args:
        names: of the layers that are adapted, by part of the pipeline.

    Raises:
        UserError: one fits none.
    """
    full = [f"{part}.{name}" for part, layers in names.items() for name in layers]
    for flag, pattern in (("rank_pattern", lora.ranks), ("alpha_pattern", lora.alphas)):
        for place in pattern:
            if not any(_holds(place, name) for name in full):
                raise UserError(
                    f"--{flag}: no adapted layer has {place!r} in its name. There are {examples(full)}; and whole "
                    f"blocks: {_block_examples(full)}"
                )


def patterns(values: Mapping[str, _Value], default: _Value) -> dict[str, _Value]:
    """PEFT's patterns of what differs from the default: the shortest ends of names that no layer of another value has.

    PEFT tries the patterns on every layer as regular expressions, one by one: the fewer, the better.

    Args:
        values: by full names of layers.
    """
    known: dict[str, set[_Value]] = defaultdict(set)
    for name, value in values.items():
        for end in _ends(name):
            known[end].add(value)
    found: dict[str, _Value] = {}
    for name, value in values.items():
        if value != default:
            found[next((end for end in _ends(name) if len(known[end]) == 1), f"^{name}")] = value
    return found


def examples(names: Iterable[str]) -> str:
    """The commonest last parts of names; a number is no name, so it takes the part before it along."""
    counts: dict[str, int] = {}
    for name in filter(_in_block, names):
        parts = name.split(".")
        end = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
        counts[end] = counts.get(end, 0) + 1
    return ", ".join(sorted(counts, key=lambda end: (-counts[end], end))[:12])


def _of_kind(module: nn.Module, layers: Sequence[str]) -> Iterator[str]:
    adaptable: dict[str, Any] = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    if not {EVERY_LAYER, EVERY_LINEAR}.isdisjoint(layers):
        wanted = nn.Linear | nn.Conv2d if EVERY_LAYER in layers else nn.Linear
        return (name for name, layer in adaptable.items() if _in_block(name) and isinstance(layer, wanted))
    for layer in layers:
        if not any(_ends_in(layer, name) for name in adaptable):
            raise UserError(
                f"--lora_layers: no Linear or Conv2d of {type(module).__name__} has a name that ends in {layer!r}. "
                f'There are {examples(adaptable)}; or give "attn", "attn-mlp", "{EVERY_LINEAR}" or "{EVERY_LAYER}".'
            )
    return (name for name in adaptable if any(_ends_in(layer, name) for layer in layers))


def _first_fit(pattern: Mapping[str, _Value], part: str, layer: str) -> _Value | None:
    return next((value for place, value in pattern.items() if _holds(place, f"{part}.{layer}")), None)


def _lies_in(block: str, name: str) -> bool:
    """Whether a layer lies in a block: a number alone is that of the outermost list that the layer lies in."""
    if _is_special(block) or block.isdigit():
        return _is_meant(block, next((part for part in name.split(".") if part.isdigit()), ""))
    return _holds(block, name)


def _holds(place: str, name: str) -> bool:
    """Whether a name has the parts of a place in a row."""
    wanted, parts = place.split("."), name.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(_is_meant, wanted, parts[first:])) for first in starts)


def _ends_in(place: str, name: str) -> bool:
    wanted, parts = place.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(map(_is_meant, wanted, parts[-len(wanted) :]))


def _is_meant(wanted: str, part: str) -> bool:
    if wanted in ("*", part):
        return bool(part)
    low, _, high = wanted.partition("-")
    return low.isdigit() and high.isdigit() and part.isdigit() and int(low) <= int(part) <= int(high)


def _is_special(part: str) -> bool:
    return part == "*" or (all(end.isdigit() for end in part.split("-", 1)) and "-" in part)


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _ends(name: str) -> Iterator[str]:
    """From the last part to the whole name; none that is a number alone."""
    parts = name.split(".")
    for first in reversed(range(len(parts))):
        if not parts[first].isdigit() or first == 0:
            yield ".".join(parts[first:])


def _block_examples(names: Iterable[str]) -> str:
    """The outermost numbered blocks, such as "transformer_blocks.0-18"."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for parts in (name.split(".") for name in names if _in_block(name)):
        first = next(place for place, part in enumerate(parts) if part.isdigit())
        numbers[".".join(parts[:first])].add(int(parts[first]))
    ranges = {block: "-".join(map(str, sorted({min(found), max(found)}))) for block, found in numbers.items()}
    return ", ".join(f"{block}.{span}" for block, span in sorted(ranges.items())[:12])
