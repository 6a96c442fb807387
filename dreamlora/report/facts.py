"""What a run folder tells, whether the run ended, was killed or is still going."""

from __future__ import annotations

import contextlib
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dreamlora.cli.local_places import is_local, without_places
from dreamlora.compare.records import model_name
from dreamlora.config import as_flat_dict
from dreamlora.config.programs import program_of
from dreamlora.credentials import is_secret, masked, masked_command, quoted
from dreamlora.errors import UserError
from dreamlora.eval_loss.items import Difference, ItemLosses
from dreamlora.figures import MOST
from dreamlora.metric_names import EVAL_LOSS, EVAL_LOSS_TRAIN, STEPS_PER_SECOND, measured_on, name_of_step_0
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.recorded import motifs_of

_LINE = 90
_OVERFITTED = 1.01
"""The last evaluation counts as worse than the best from this ratio on; below it, the two are the same for a reader."""


@dataclass(frozen=True)
class Curve:
    """One metric over the run; values that were not finite are left out."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class LossCourse:
    """The deterministic loss at its notable moments.

    Attributes:
        metric: its name.
        base: before the first step; None if that was not measured.
    """

    metric: str
    base: float | None
    final: float
    final_step: int
    best: float
    best_step: int

    @property
    def held_out(self) -> bool:
        """Whether its images were kept out of training."""
        return self.metric == EVAL_LOSS

    @property
    def change(self) -> float | None:
        """From base to final, as a fraction of the base."""
        return None if not self.base else self.final / self.base - 1

    @property
    def past_best(self) -> bool:
        """Whether the run ended noticeably worse than it once was."""
        return self.final > self.best * _OVERFITTED


@dataclass(frozen=True)
class ImageMetricCurve:
    """A metric of drawn images over the run.

    Attributes:
        name: such as "img/clip_t".
        curve: its values, all of the same images.
        earlier: curves of other images, or by other encoders, before a resume: not to be compared with ``curve``.
        n: generated images that went in.
        n_other: images on the other side; None if there is no such side.
        encoder_id: what they were seen by.
    """

    name: str
    curve: Curve
    earlier: tuple[Curve, ...]
    n: int
    n_other: int | None
    encoder_id: str


class RunFacts:
    """All that the report shows, read from the run folder; everything but config.yaml may be missing.

    Raises:
        UserError: the folder holds no run, or its config or summary cannot be read.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.name = folder.path.resolve().name
        self.config: dict[str, Any] = folder.config()
        self.summary = folder.summary()
        self.finished = folder.summary_file.exists()
        self.curves, self._earlier, self._not_finite = _curves(folder.metrics())

    def curve(self, name: str) -> Curve:
        """A metric's curve; empty if it was not logged."""
        return self.curves.get(name, Curve((), ()))

    def groups(self, name: str) -> dict[str, Curve]:
        """The curves of a metric's layer groups; that of all layers, under "", if there are no groups."""
        curves = {key[len(name) + 1 :]: curve for key, curve in self.curves.items() if key.startswith(f"{name}/")}
        return curves or ({"": self.curve(name)} if self.curve(name) else {})

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((curve.steps[-1] for curve in self.curves.values() if curve), default=0)

    @property
    def base(self) -> str:
        """What was measured at step 0."""
        return name_of_step_0(self.config.get("init_lora"))

    @property
    def total_steps(self) -> int | None:
        """How many steps the run was to have."""
        return self.config.get("max_train_steps")

    @cached_property
    def evaluation(self) -> LossCourse | None:
        """The held-out loss, or the loss on training images where none were held out."""
        name = EVAL_LOSS if self.curve(EVAL_LOSS) else EVAL_LOSS_TRAIN
        curve = self.curve(name)
        if not curve:
            return None
        base = curve.values[0] if curve.steps[0] == 0 else None
        best = int(np.argmin(curve.values))
        final, step = curve.values[-1], curve.steps[-1]
        return LossCourse(name, base, final, step, curve.values[best], curve.steps[best])

    @cached_property
    def selection(self) -> dict[str, Any]:
        """What best/selection.json says; empty if no checkpoint was selected."""
        return self.folder.selection()

    @cached_property
    def range_test(self) -> dict[str, Any]:
        """What learning_rate_test.json says; empty if the rate was given."""
        return self.folder.range_test()

    @cached_property
    def image_metrics(self) -> list[ImageMetricCurve]:
        """The metrics of drawn images, in the order they were logged."""
        rows = {row["name"]: row for row in self.folder.metrics() if row.get("encoder_id") and "n" in row}
        return [
            ImageMetricCurve(
                name, self.curve(name), self._earlier.get(name, ()), row["n"], row.get("n_other"), row["encoder_id"]
            )
            for name, row in rows.items()
            if self.curve(name)
        ]

    @cached_property
    def best_against_last(self) -> Difference | None:
        """The best checkpoint against the last step on the larger set; None if they are one, or not measured."""
        best, last = self.selection.get("step"), self.steps
        losses = ItemLosses.found(self.folder.final_items_file)
        if best in (None, last) or losses is None:
            return None
        return losses.difference(best, last) if best in losses and last in losses else None

    @cached_property
    def average_and_raw(self) -> tuple[ItemLosses, ItemLosses] | None:
        """Losses of the moving average and of the weights that it is of, at the steps where both are known; None: there
        are none.
        """
        average, raw = map(ItemLosses.found, (self.folder.eval_items_file, self.folder.raw_items_file))
        if average is None or raw is None or average.evalset_id != raw.evalset_id:
            return None
        common = average.rows.keys() & raw.rows.keys()
        if not common or average.image.shape != raw.image.shape:
            return None
        average, raw = (replace(one, rows={step: one.rows[step] for step in common}) for one in (average, raw))
        return average, raw

    @cached_property
    def fall_by_image(self) -> tuple[float, ...]:
        """How far the loss of every evaluated image fell from first to last measurement; empty if unknown."""
        losses = ItemLosses.found(self.folder.eval_items_file)
        if losses is None:
            return ()
        fall, images = losses.rows[losses.steps[0]] - losses.rows[losses.steps[-1]], losses.image
        return tuple(float(fall[images == image].mean()) for image in np.unique(images))

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        texts = [str(text) for text in self.summary.get("warnings") or []]
        if not self.finished:
            of = f" of {self.total_steps}" if self.total_steps else ""
            texts.append(f"The run has not ended (or was stopped): this is its state at step {self.steps}{of}.")
        evaluation = self.evaluation
        if evaluation and not evaluation.held_out and not any("held" in text for text in texts):
            texts.append("No images were held out, so overfitting cannot be seen: the loss is that of training images.")
        if evaluation and (earlier := self._earlier.get(evaluation.metric)):
            until = max(curve.steps[-1] for curve in earlier)
            texts.append(
                f"The evaluation loss up to step {until} was measured on other items (since then the images to measure "
                "on, or their captions, have changed) and is left out."
            )
        if evaluation is None:
            texts.append("No evaluation was logged: there is no number that tells whether the training helped.")
        texts += [f"{text}." for text in self.folder.damage()]
        for name, count in self._not_finite.items():
            texts.append(f"{count} values of {name} were not finite (NaN or infinite).")
        return texts

    @property
    def options(self) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
        """Option, value and default: of those that differ from their default, and of the others."""
        changed: list[tuple[str, str, str]] = []
        unchanged: list[tuple[str, str, str]] = []
        defaults = as_flat_dict(program_of(self.config)())
        for name, value in self.config.items():
            default = defaults.get(name)
            text = "(hidden)" if is_secret(name) and value else masked(value_text(value))
            row = (name, text, "automatic" if default in (None, []) else value_text(default))
            (unchanged if value == default else changed).append(row)
        return changed, unchanged

    @cached_property
    def outline(self) -> list[tuple[str, str]]:
        """What the run takes and does, in the words that it said before its first step; empty for older runs."""
        return list(self.folder.outline().items())

    @property
    def command(self) -> str | None:
        """The command line that made the run, without secrets; long ones with a line for every flag."""
        return readable_command(self.summary.get("command"))

    @property
    def model(self) -> str:
        """The base model's name."""
        return model_name(self.config)

    @property
    def prompts(self) -> list[str]:
        """The prompts that were drawn, in the order of the grid's columns."""
        return list(dict.fromkeys(motif.prompt for motif in motifs_of(self.folder.sample_rows())))

    @property
    def speed(self) -> float | None:
        """Median optimizer steps per second."""
        curve = self.curve(STEPS_PER_SECOND)
        return float(np.median(curve.values)) if curve else None


class SharedFacts(RunFacts):
    """Those that tell nothing of the machine: not where anything lies, and no free text, in which that may stand."""

    @property
    def warnings(self) -> list[str]:
        """None."""
        return []

    @property
    def options(self) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
        """Those that name no place."""
        changed, unchanged = super().options
        told = without_places(self.config)
        return [row for row in changed if row[0] in told], [row for row in unchanged if row[0] in told]

    @cached_property
    def outline(self) -> list[tuple[str, str]]:
        """None."""
        return []

    @property
    def command(self) -> None:
        """None."""
        return None

    @property
    def model(self) -> str:
        """The base model's name; of a folder its last part."""
        return Path(super().model).name if is_local(super().model) else super().model


def require_run(folder: RunFolder) -> None:
    """Nothing, if there is a run.

    Raises:
        UserError: there is none.
    """
    if not folder.holds_run():
        raise UserError(f"there is no run in {folder.path}: config.yaml is missing")


def readable_command(command: str | None) -> str | None:
    """A command line without secrets; a long one with a line for every flag."""
    text = masked_command(str(command or ""))
    if len(text) > _LINE:
        with contextlib.suppress(ValueError):  # it may be a stranger's
            words = [quoted(word) for word in shlex.split(text)]
            text = " ".join(f"\\\n    {word}" if word.startswith("--") else word for word in words)
    return text or None


def value_text(value: Any) -> str:
    """An option's value as a person would write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return ("off", "on")[value]
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curves(
    rows: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, Curve], dict[str, tuple[Curve, ...]], dict[str, int]]:
    """Every metric's curve; its earlier ones, which are of something else; and how many values were not finite."""
    points: dict[str, dict[tuple[Any, ...], dict[int, float]]] = defaultdict(dict)
    not_finite: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["value"] is None or abs(row["value"]) > MOST:
            not_finite[row["name"]] += 1
        else:
            same = points[row["name"]].setdefault(measured_on(row), {})
            same[row["step"]] = float(row["value"])
    curves = {
        name: [Curve(tuple(sorted(p)), tuple(p[step] for step in sorted(p))) for p in parts.values()]
        for name, parts in points.items()
    }
    current = {name: parts[-1] for name, parts in curves.items()}
    return current, {name: tuple(parts[:-1]) for name, parts in curves.items() if parts[1:]}, dict(not_finite)
