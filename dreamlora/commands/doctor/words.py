"""The text that ``dreamlora doctor`` prints of what it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.commands.columns import in_columns
from dreamlora.escapes import one_line
from dreamlora.figures import gibibytes


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines, from ``diagnosis.diagnose``."""
    yield from (one_line(line) for line in _lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"model: {found['model']}"
    if "family" in found:
        yield f"  family {found['family']}: {found['recognised_by']}"
        yield from in_columns([("part", "class", "precision", "parameters", "on disk"), *map(_part, found["parts"])])
    if "trained" in found:
        yield ""
        yield "trained:"
        yield from in_columns([("part", "layers", "parameters", "rank", "alpha"), *map(_trained, found["trained"])])
    if "data" in found:
        yield ""
        yield "data:"
        yield from _of_data(found["data"])
    if "run" in found:
        yield ""
        yield "run:"
        yield from in_columns(list(found["run"].items()))
    if "memory" in found:
        yield ""
        yield f"memory on the {found['memory']['device']}, an estimate: {found['memory']['how']}"
        yield from in_columns([("stage", "held", "computing", "in all"), *map(_stage, found["memory"]["stages"])])
    if found.get("vram"):
        yield ""
        yield "what --vram chooses, by the gigabytes of the GPU:"
        yield from in_columns([("--vram", "needs", "most in", "flags"), *map(_card, found["vram"])])
    if found.get("disk"):
        yield ""
        yield "disk:"
        yield from _of_disk(found["disk"])
    yield ""
    yield from (f"error: {text}" for text in found["errors"])
    yield from (f"warning: {text}" for text in found["warnings"])
    errors = len(found["errors"])
    yield "it would run" if found["would_run"] else f"it would not run: {errors} error{'s' if errors > 1 else ''}"


def _part(part: Mapping[str, Any]) -> tuple[str, ...]:
    if part["problem"]:
        return part["name"], part["class"], "cannot be loaded"
    if not part["bytes"]:
        return part["name"], part["class"]
    parameters = f"{part['parameters']:,}" if part["parameters"] else "a pickle, not opened"
    size = gibibytes(part["bytes"]) + ("" if part["here"] else " to download")
    return part["name"], part["class"], part["precision"] or "", parameters, size


def _trained(each: Mapping[str, Any]) -> tuple[str, ...]:
    scale = " ".join(map(str, each["ranks"])), " ".join(f"{alpha:g}" for alpha in each["alphas"])
    return each["part"], str(each["layers"]), f"{each['parameters']:,}", *scale


def _of_data(data: Mapping[str, Any]) -> Iterator[str]:
    small, large = (" x ".join(map(str, data[name])) for name in ("smallest", "largest"))
    yield f"  images to learn: {data['images']}, held out: {data['held_out']}, different captions: {data['captions']}"
    yield f"  sizes: from {small} to {large} pixels" if small != large else f"  sizes: {small} pixels"
    yield "  trained at: " + ", ".join(f"{size}: {count}" for size, count in data["buckets"].items())


def _stage(stage: Mapping[str, Any]) -> tuple[str, ...]:
    if stage["work"] is None:
        return stage["stage"], gibibytes(stage["held"]), f"not known ({stage['rough']})"
    figures = map(gibibytes, (stage["held"], stage["work"], stage["held"] + stage["work"]))
    return stage["stage"], *figures, *(["(roughly)"] if stage["rough"] else [])


def _card(row: Mapping[str, Any]) -> tuple[str, ...]:
    if not row["fits"]:
        return row["vram"], gibibytes(row["needed"]), row["stage"], f"does not fit, not even with {row['flags']}"
    return row["vram"], gibibytes(row["needed"]), row["stage"], row["flags"] or "no others"


def _of_disk(disk: Mapping[str, Any]) -> Iterator[str]:
    prompts = "not known" if disk["prompts"] is None else f"at most {gibibytes(disk['prompts'])}"
    yield f"  cache {disk['cache']}: latents {gibibytes(disk['latents'])} more, embeddings of prompts {prompts}"
    yield f"    free there: {gibibytes(disk['cache_free'])}"
    yield f"  checkpoints: {gibibytes(disk['checkpoints'])}"
