"""compare.json as the report needs it: checked, with numbers as numbers, and told in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamlora.compare.schema import COMPARE_FILE, COMPARISON, SCHEMA_VERSION
from dreamlora.credentials import masked_command
from dreamlora.errors import UserError
from dreamlora.figures import value_of
from dreamlora.reading import read_json, shortened
from dreamlora.report.facts import readable_command
from dreamlora.schemas import OBJECT

_FEW_SEEDS = 3


class ComparisonFile:
    """A comparison of optimizers, as compare.json tells it.

    Args:
        folder: holds compare.json.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / COMPARE_FILE
        self.raw: dict[str, Any] = _read(self.file)
        self.methods: list[dict[str, Any]] = self.raw["methods"]
        self.runs: list[dict[str, Any]] = self.raw["runs"]

    def __getitem__(self, key: str) -> Any:
        return self.raw.get(key)

    @cached_property
    def labels(self) -> list[str]:
        """Names of the methods, the baseline first."""
        return [method["label"] for method in self.methods]

    @property
    def baseline(self) -> str:
        """Name of the method that the others are compared with."""
        return str(self.raw["baseline"])

    @cached_property
    def findings(self) -> list[str]:
        """One sentence for each method that was compared, the lowest loss first; the first is the headline."""
        deltas = [method["delta"] for method in self.methods if method["delta"]]
        if len(deltas) < 2:
            return [str(self.raw["sentence"])]
        deltas.sort(key=lambda delta: math.inf if (mean := value_of(delta["pct"]["mean"])) is None else mean)
        return [delta["sentence"].rstrip(".") + "." for delta in deltas]

    @property
    def setup(self) -> str:
        """What was compared, in one line."""
        task = self.raw["task"]
        parts = [str(task.get("model") or ""), str(task.get("data") or "")]
        parts += [f"{task['steps']} steps"] if task.get("steps") else []
        parts += [f"{len(self.runs)} runs", str(task.get("device") or "")]
        return " · ".join(part for part in parts if part)

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        texts = [str(text) for text in self.raw["warnings"]]
        if not self.raw.get("complete", True):
            ended = sum(run["status"] in ("finished", "diverged", "failed") for run in self.runs)
            texts.insert(0, f"Not complete: {ended} runs have ended, others are to come. The numbers will change.")
        texts += [f"Left out: {dropped['run']} ({dropped['reason']})." for dropped in self.raw.get("dropped") or []]
        return texts

    @property
    def command(self) -> str | None:
        """The command line that makes the comparison again."""
        return readable_command(self.raw.get("command"))

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Every run's id and command line, where it is known."""
        commands = ((run["id"], readable_command(run.get("command"))) for run in self.runs)
        return [(name, command) for name, command in commands if command]


def without_secrets(raw: dict[str, Any]) -> dict[str, Any]:
    """compare.json as it may be shown to others."""
    runs = [{**run, "command": run.get("command") and masked_command(run["command"])} for run in raw["runs"]]
    return {**raw, "runs": runs, "command": raw.get("command") and masked_command(raw["command"])}


@dataclass(frozen=True)
class Verdict:
    """What is said of a method besides its numbers.

    Attributes:
        tone: "good", "bad" or "fair": how it is coloured. Words and signs say the same.
        word: such as "better".
        cautions: what the number depends on, such as "LR grid edge".
    """

    tone: str
    word: str
    cautions: tuple[str, ...]


def verdict(method: dict[str, Any]) -> Verdict:
    """The verdict on a method, with the cautions that belong beside it."""
    delta = method["delta"]
    suffixes = tuple(delta["suffixes"]) if delta else ()
    word = "baseline" if method["is_baseline"] else delta["word"] if delta else "not compared"
    tone = {"better": "good", "worse": "bad"}.get(word, "fair")
    cautions = tuple(dict.fromkeys((*suffixes, *(() if suffixes else _own_cautions(method)))))
    return Verdict(tone, word, cautions)


def _own_cautions(method: dict[str, Any]) -> tuple[str, ...]:
    """For a baseline, which has no delta that would carry them."""
    diverged, seeds = method["headline_diverged"], len(method["headline_seeds"])
    cautions = [] if method["tuned"] else ["not tuned"]
    cautions += ["LR grid edge"] if method["at_grid_edge"] else []
    cautions += [f"{diverged} of {seeds} seeds diverged or failed"] if diverged else []
    return (*cautions, *(["few seeds"] if seeds < _FEW_SEEDS else []))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file, OBJECT)
    except FileNotFoundError:
        raise UserError(f"there is no comparison in {file.parent}: {COMPARE_FILE} is missing") from None
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{file} has schema_version {shortened(version)}; this dreamlora reads {SCHEMA_VERSION}: compare anew"
        )
    try:
        comparison: dict[str, Any] = COMPARISON.check(content)
        _check_whole(comparison)
    except ValueError as error:
        raise UserError(f"cannot read {file}: {error}. Compare anew") from None
    return comparison


def _check_whole(comparison: Mapping[str, Any]) -> None:
    """Raises ValueError unless the parts that belong together do."""
    labels = [method["label"] for method in comparison["methods"]]
    if not labels or len(set(labels)) < len(labels):
        raise ValueError("methods: every one must have a label of its own, and there must be one")
    if comparison["baseline"] not in labels:
        raise ValueError(f"baseline: there is no method {shortened(comparison['baseline'])}")
    columns = [(f"methods.{n}.curve", list(method["curve"].values())) for n, method in enumerate(comparison["methods"])]
    columns += [(f"runs.{n}", [run["steps"], run["losses"]]) for n, run in enumerate(comparison["runs"])]
    columns += [
        (f"runs.{n}", [run["steps"], run["seconds"]]) for n, run in enumerate(comparison["runs"]) if run["seconds"]
    ]
    for where, lists in columns:
        if len(set(map(len, lists))) > 1:
            raise ValueError(f"{where}: the lists are not of the same length")
