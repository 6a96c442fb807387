"""All that ``dreamlora inspect`` finds of a file, as it is printed with ``--json`` (docs/inspect.md). No torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dreamlora.commands.inspect.about import about
from dreamlora.commands.inspect.adapters import Alphas, LayerFacts, facts_of
from dreamlora.commands.inspect.source import file_of
from dreamlora.commands.inspect.tensors import Digests, TensorFile, tensor_file
from dreamlora.errors import UserError
from dreamlora.lora.file_layers import FileLayer, adapter_layers, holds_embeddings, parts_of_model, weight_layers
from dreamlora.lora.recognise import (
    Candidate,
    Guess,
    format_of,
    guess_family,
    is_known_text_layer,
    model_of,
    models_of_embeddings,
    named_families,
    place_of,
)

SCHEMA = 1
"""Raised when a field changes what it means, or goes; new ones may come."""
_CLIP_LAYERS = {768: 72, 1024: 138, 1280: 193}
"""That can have an adapter, by the width of CLIP's text encoders: L, H (as Stable Diffusion 2 has it), bigG."""
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash")
_MOST_PROBLEMS = 20


def findings(path: Path) -> dict[str, Any]:
    """What a file is, and what is in it.

    Args:
        path: of a file, a folder with one, or a run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    place = file_of(path)
    try:
        with tensor_file(place.file, place.inside) as file:
            found = {"schema": SCHEMA, "file": str(place.file), "bytes": file.size, **_content(file, place.settings)}
            digests = file.digests()
    except FileNotFoundError:
        raise UserError(f"no such file: {place.file}") from None
    return {
        **found,
        "about": about(file.metadata),
        "metadata": dict(sorted(file.metadata.items())),
        "hashes": _hashes(file, digests),
        "run": place.run,
    }


def _content(file: TensorFile, peft: dict[str, Any] | None) -> dict[str, Any]:
    layers, others = adapter_layers(file.shapes)
    found: dict[str, Any] = {"what": "other", "format": "", "family": None, "parts": [], "problems": []}
    found |= {"tensors": len(file.shapes), "numbers": sum(map(math.prod, file.shapes.values()))}
    found |= {"types": _types(file, file.shapes), "other_tensors": []}
    if layers:
        names = [name for layer in layers for name in layer.parts.values()]
        guess, alphas = guess_family(layers, file.metadata), Alphas(file, peft)
        facts = list(facts_of(file, layers, alphas))
        found |= {"what": "adapter", "format": format_of(names), "family": _family(guess)}
        found |= {"parts": _parts(file, facts, guess), "other_tensors": sorted(others)}
        found["problems"] = [*_lies(file, guess), *_problems(alphas.problems, facts, others)]
    elif holds_embeddings(file.shapes):
        found |= {"what": "embedding", "embeddings": {name: list(shape) for name, shape in file.shapes.items()}}
        found["models"] = models_of_embeddings(file.shapes)
    elif family := _family(guess_family(weight_layers(file.shapes), file.metadata)):
        found |= {"what": "model", "family": family, "contents": list(parts_of_model(file.shapes))}
    else:
        found["other_tensors"] = sorted(file.shapes)
    return found


def _family(guess: Guess) -> dict[str, Any] | None:
    if not guess.candidates:
        return None
    first, *others = (_candidate(candidate) for candidate in guess.candidates)
    return {**first, "certainty": guess.certainty, "or": others}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    models = [version.name for version in candidate.versions]
    return {"name": candidate.family, "models": models, "known": round(candidate.known, 4)}


def _parts(file: TensorFile, facts: Sequence[LayerFacts], guess: Guess) -> list[dict[str, Any]]:
    """The components that have adapters, the denoiser first."""
    components = sorted({fact.layer.component for fact in facts})
    return [_part(file, name, [fact for fact in facts if fact.layer.component == name], guess) for name in components]


def _part(file: TensorFile, component: str, facts: Sequence[LayerFacts], guess: Guess) -> dict[str, Any]:
    candidate = guess.candidates[0] if guess.candidates else None
    adapted, most = _coverage(component, [fact.layer for fact in facts], candidate)
    tensors = [name for fact in facts for name in fact.layer.parts.values()]
    sizes = [fact.size for fact in facts if fact.size is not None]
    ranks = [size.stable_rank for size in sizes if size.norm]
    return {
        "part": component or (candidate.denoiser if candidate else "denoiser"),
        "layers": len(facts),
        "adapted": adapted,
        "of": most,
        "kinds": _counts(fact.kind for fact in facts),
        "ranks": _counts(
            "whole" if fact.rank is None else str(fact.rank) for fact in sorted(facts, key=lambda fact: fact.rank or 0)
        ),
        "alphas": _counts(f"{fact.alpha:g}" for fact in facts if fact.alpha is not None),
        "types": _types(file, tensors),
        "numbers": sum(math.prod(file.shapes[name]) for name in tensors),
        "norm": math.sqrt(sum(size.norm**2 for size in sizes)) if sizes else None,
        "largest": max((size.largest for size in sizes), default=None),
        "stable_rank": [min(ranks), statistics.median(ranks), max(ranks)] if ranks else None,
        "measured": len(sizes),
        "not_finite": [fact.layer.name for fact in facts if not fact.finite],
        "zero": [fact.layer.name for fact in facts if fact.zero],
    }


def _coverage(component: str, layers: Sequence[FileLayer], candidate: Candidate | None) -> tuple[int, int | None]:
    """How many layers of the model as diffusers has it have an adapter, and how many could; None: not known."""
    if component:
        known = [layer for layer in layers if is_known_text_layer(layer.layer)]
        widths = {layer.columns for layer in known if not layer.layer.endswith("fc2")}
        return len(known), _CLIP_LAYERS.get(widths.pop()) if len(widths) == 1 else None
    if candidate is None:
        return 0, None
    model, count = model_of(candidate.family), 0
    for layer in layers:
        if found := place_of(model, layer.layer):
            place, is_original = found
            count += len(place.layers) if is_original else 1
    return count, candidate.versions[0].layers if candidate.versions else None


def _lies(file: TensorFile, guess: Guess) -> Iterator[str]:
    """Where the header names another family than the layers are of."""
    named = named_families(file.metadata)
    if named and guess.candidates and not {one.family for one in guess.candidates} & set(named):
        theirs = guess.candidates[0].family
        yield f"its header says that it is for the family {named[0]}, and its layers are those of {theirs}"


def _problems(said: Sequence[str], facts: Sequence[LayerFacts], others: Sequence[str]) -> list[str]:
    problems = list(dict.fromkeys(said))
    if len(problems) > _MOST_PROBLEMS:
        problems = [*problems[:_MOST_PROBLEMS], f"and {len(problems) - _MOST_PROBLEMS} more of this kind"]
    odd, zero = ([fact.layer.name for fact in facts if wrong(fact)] for wrong in (_is_odd, _is_zero))
    if odd:
        problems.append(f"{_some(odd)}: numbers are not finite, so images would be black or noise")
    if zero:
        problems.append(f"{_some(zero)}: zeros, which do nothing")
    if others:
        problems.append(f"{_some(others)}: tensors that are no part of a LoRA, DoRA, LoHa or LoKr")
    unmeasured = sum(fact.size is None and fact.finite for fact in facts)
    if unmeasured:
        problems.append(
            f"{unmeasured} of {len(facts)} layers have no norm here: it would take long, or their tensors do not fit"
        )
    return problems


def _is_odd(fact: LayerFacts) -> bool:
    return not fact.finite


def _is_zero(fact: LayerFacts) -> bool:
    return fact.zero


def _some(names: Sequence[str]) -> str:
    """The number of them, and the first."""
    return names[0] if len(names) == 1 else f"{len(names)}, such as {names[0]}"


def _hashes(file: TensorFile, digests: Digests) -> dict[str, Any]:
    said = {key: file.metadata[key].lower().removeprefix("0x") for key in _HASHES if file.metadata.get(key)}
    agrees = all(value == digests.tensors for value in said.values()) if said else None
    return {
        "sha256": digests.file,
        "AutoV2": digests.file[:10],
        "AutoV3": digests.tensors[:12],
        "tensors_sha256": digests.tensors,
        "header_agrees": agrees,
    }


def _types(file: TensorFile, names: Iterable[str]) -> dict[str, int]:
    """How many tensors there are of each, the most first."""
    return dict(Counter(file.types[name] for name in names).most_common())


def _counts(values: Iterable[str]) -> dict[str, int]:
    """How often each comes, in the order of the first."""
    return dict(Counter(values))
