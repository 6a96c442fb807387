"""The text that ``dreamlora inspect`` prints of what it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dreamlora.commands.columns import in_columns
from dreamlora.escapes import one_line
from dreamlora.figures import amount, gibibytes
from dreamlora.reading import shortened_text

_OTHER = "nothing that is known here: no LoRA, no model of a known family, no embedding of words"
_FORMATS = {
    "original": "names of the model's original code, which diffusers' converters read",
    "xlabs": "xlabs, which diffusers' converters read",
    "diffusers (old)": "diffusers before PEFT, which its converters read",
    "": "none that is known",
}
_CERTAINTY = {
    "certain": "names and sizes of its layers",
    "likely": "likely, going by its layers and its header",
    "unsure": "unsure: its layers are not those of one published model alone",
}
_MOST_VALUES = 6
"""Different ranks or alphas that are told one by one."""


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines, from ``findings.findings``."""
    yield from (one_line(line) for line in _lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['file']}: {_what(found)}"
    yield from in_columns(list(_facts(found)))
    if found["parts"]:
        yield ""
        yield from in_columns([_HEADER, *map(_part, found["parts"])])
        yield ""
        yield from in_columns([_SIZES, *map(_sizes, found["parts"])])
    if found["about"]:
        yield ""
        yield "its header says:"
        yield from in_columns([(label, shortened_text(text)) for label, text in found["about"].items()])
    yield ""
    yield "hashes:"
    yield from in_columns(list(_hashes(found["hashes"])))
    if found["run"]:
        yield ""
        yield f"run {found['run']['folder']}:"
        yield from in_columns(list(_run(found["run"])))
    if found["problems"]:
        yield ""
        yield from (f"warning: {problem}" for problem in found["problems"])


def _what(found: Mapping[str, Any]) -> str:
    family = found["family"]
    models = f" for {_models(family)}" if family else ""
    if found["what"] == "adapter":
        kinds = list(dict.fromkeys(kind for part in found["parts"] for kind in part["kinds"]))
        return " and ".join(map(_kind, kinds)) + models
    if found["what"] == "embedding":
        vectors = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in found["embeddings"].items())
        models = f", as {', '.join(found['models'])} have them" if found["models"] else ""
        return f"an embedding of words (textual inversion): {vectors}{models}"
    if found["what"] == "model":
        return f"weights of a model ({', '.join(found['contents'])}), {_models(family)}"
    return _OTHER


def _kind(kind: str) -> str:
    name, of, rest = kind.partition(" ")
    return {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}[name] + of + rest


def _models(family: Mapping[str, Any]) -> str:
    each = [" or ".join(one["models"]) or f"the family {one['name']}" for one in (family, *family["or"])]
    return " or ".join(each)


def _facts(found: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    if found["what"] == "adapter":
        yield "format", _FORMATS.get(found["format"], found["format"])
    if found["family"]:
        known = f"{found['family']['known']:.0%} of its layers are known"
        yield "family", f"{found['family']['name']} ({_CERTAINTY[found['family']['certainty']]}; {known})"
    elif found["what"] == "adapter":
        yield "family", "none that is known: names of its layers are those of no model here"
    if found["what"] == "other":
        yield "tensors", shortened_text(", ".join(found["other_tensors"])) or "none"
    types = ", ".join(f"{name} ({count} tensors)" for name, count in found["types"].items())
    yield "precision", types or "–"
    yield "size", f"{gibibytes(found['bytes'])}, {found['numbers']:,} numbers"


_HEADER = ("part", "layers", "of", "rank", "alpha", "precision", "numbers")
_SIZES = ("part", "norm of ΔW", "largest singular value", "stable rank (least, median, most)", "zero", "not finite")


def _part(part: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        part["part"],
        str(part["layers"]),
        f"{part['adapted']} of {part['of']}" if part["of"] else "not known",
        _values(part["ranks"]),
        _values(part["alphas"]),
        " ".join(part["types"]),
        f"{part['numbers']:,}",
    )


def _sizes(part: Mapping[str, Any]) -> tuple[str, ...]:
    stable = ", ".join(map(amount, part["stable_rank"] or ())) or "–"
    counts = (str(len(part[name])) for name in ("zero", "not_finite"))
    return part["part"], amount(part["norm"]), amount(part["largest"]), stable, *counts


def _values(counts: Mapping[str, int]) -> str:
    """Such as "8" and "4 (12), 8 (180)"."""
    if len(counts) > _MOST_VALUES:
        values = sorted(float(value) for value in counts if value != "whole")
        return f"{len(counts)} from {values[0]:g} to {values[-1]:g}"
    if len(counts) < 2:
        return next(iter(counts), "–")
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _hashes(hashes: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    said = {
        True: "as its header says",
        # LyCORIS, and the merges of sd-scripts, hash the tensors in the order in which they had them
        False: "not what its header says: tensors were changed since, or hashed in another order than the file's",
        None: "",
    }
    yield "SHA-256", hashes["sha256"]
    yield "AutoV2", hashes["AutoV2"]
    yield "AutoV3", f"{hashes['AutoV3']}  {said[hashes['header_agrees']]}".rstrip()


def _run(run: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    best = run["best"]
    yield "result", "there" if run["result"] else "not yet: it has not ended"
    if best:
        yield "best", best["file"] + (f", of step {best['step']}" if best["step"] is not None else "")
    if run["raw"]:
        yield "without its average", run["raw"]
    if run["embeddings"]:
        yield "embeddings of", ", ".join(run["embeddings"])
    yield "checkpoints", ", ".join(map(str, run["checkpoints"])) or "none"
