"""When image metrics (CLIP score, DINO, KID, ...) are computed from the images of a step, and where they go."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.eval_loss.items import Difference, paired_difference
from dreamlora.eval_loss.selection import difference_text
from dreamlora.evaluation.embedders import Embedders
from dreamlora.evaluation.measure import MeasuredImages, Value, load_metric, measure, read
from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading, StepResult
from dreamlora.jsonl import read_jsonl
from dreamlora.metric_names import OTHER_IMAGES, is_part, of_metric
from dreamlora.metrics import clip_score, dino
from dreamlora.metrics._vectors import paired_cosines
from dreamlora.processes import tell_everyone
from dreamlora.sampling.sampler import SamplePlan
from dreamlora.schemas import SAMPLE_ROW
from dreamlora.training.loop import Run

CLIP_CHANGE = of_metric(clip_score.NAME, "change")
LARGEST_DROP = 0.02
"""By so much CLIP-T may fall below the base model's before a checkpoint is refused."""
CLEAR = 2.0
"""Paired standard errors that make a fall clear: few images must not overrule the loss."""


@dataclass(frozen=True)
class Scenes:
    """The images of every step, and what they are compared with.

    Attributes:
        folder: with a folder per step, as samples/ of the run folder.
        plan: what is drawn at every step.
        texts: what every image of the plan is scored against.
        with_subject: whether the image's prompt names what is learned.
        references: images that are not trained on.
        training: images that are.
    """

    folder: Path
    plan: SamplePlan
    texts: Sequence[str]
    with_subject: Sequence[bool]
    references: Sequence[ImageRecord]
    training: Sequence[ImageRecord]

    @cached_property
    def id(self) -> str:
        """Of prompts, seeds, settings and texts, in whatever order: values of other images must not be compared."""
        parts = zip(map(self.plan.picture_id, self.plan.items()), self.texts, self.with_subject, strict=True)
        return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()[:12]

    def files(self, step: int) -> list[str]:
        """What is drawn at a step, in the order in which processes share the drawing: each reads its own files."""
        return [f"step_{step:06d}/{self.plan.file_name(item)}" for item in self.plan.items()]

    def images(self, step: int) -> list[ImageRecord]:
        """The images of ``files``, which are read when they are needed."""
        files = [self.folder / name for name in self.files(step)]
        return [ImageRecord(file.name, "image", file.read_bytes, str(file)) for file in files]

    def gallery(self, step: int, *, with_base: bool) -> MeasuredImages:
        """All that metrics of a step need; the base model's images only if they are any good."""
        return MeasuredImages(
            generated=self.images(step),
            groups=[item.prompt_index for item in self.plan.items()],
            with_subject=self.with_subject,
            texts=self.texts,
            references=self.references,
            training=self.training,
            base=self.images(0) if with_base else (),
        )

    def problem(self, step: int) -> str | None:
        """Why the images of a step cannot be measured, if they cannot."""
        files = self.files(step)
        drawn = read_jsonl(self.folder / "samples.jsonl", SAMPLE_ROW)
        rows = {row["file"]: row for row in drawn if row["file"] in files}
        wrong = [row for row in rows.values() if row.get("problem")]
        if wrong:
            return f"{len(wrong)} of {len(rows)} images are {wrong[0]['problem']}"
        return None if len(rows) == len(files) else "images are missing"


class _ClipChange:
    """CLIP-T of every image against that of the base model's image of the same prompt and seed.

    No plug-in, as it is logged with its standard error, which decides a veto.
    """

    NAME = CLIP_CHANGE
    ABOUT = "Change of CLIP-T from the base model's images. Higher is better"
    ENCODER: EncoderRole = clip_score.ENCODER
    NEEDS: frozenset[Need] = frozenset({"prompts", "base"})
    HIGHER_IS_BETTER = True
    SELECTS = True
    COMPARES_SETS = False

    def compute(self, inputs: MetricInputs) -> Reading:
        """The mean difference, with its paired standard error as the part "se"."""
        assert inputs.prompts is not None and inputs.base is not None
        now, base = (paired_cosines(images, inputs.prompts).numpy() for images in (inputs.generated, inputs.base))
        difference = paired_difference(now, base)
        return Reading(difference.mean, difference.n, parts={"se": difference.se})


class ImageMetricsCallback:
    """Measures the images of step 0, of every ``every`` steps and of the end; comes after what draws them.

    All processes share the encoding. A metric that cannot be computed is left out, with a note that says why. Values of
    an interrupted run count only if they are of the same images (prompts, seeds, settings), seen by the same encoders.

    Args:
        names: of plug-ins in ``metrics/``.
        every: steps between two measurements; the images are drawn as often.
        scenes: the images.
        embedders: the encoders.
        note: tells the person something, now and in the report.
    """

    def __init__(
        self, names: Sequence[str], every: int, scenes: Scenes, embedders: Embedders, note: Callable[[str], object]
    ) -> None:
        self._names = names
        self._every = every
        self._scenes = scenes
        self._embedders = embedders
        self._note = note
        self._noted: set[str] = set()
        self._logged: dict[int, set[str]] = {}
        self._values: dict[int, dict[str, float]] = {}
        self._changes: dict[int, Difference] = {}

    def on_start(self, run: Run) -> None:
        """Measure the base model; after a resume only what is missing, such as images that it was not measured on."""
        if run.step:
            encoders = self._encoders()
            if run.accelerator.is_main_process:
                self._take_up(run, encoders)
            self._measure_missing(run, 0)
        self._measure_if_due(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Measure if it is time."""
        self._measure_if_due(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step was measured."""

    def vetoes(self, steps: Sequence[int]) -> dict[int, str]:
        """Which of these steps must not be selected: those at whose last measurement the prompts were forgotten.

        That is, CLIP-T on the run's images had fallen by more than 0.02 below the base model's on the same prompts and
        seeds, and by two paired standard errors more than that.
        """
        reasons = {}
        for step in steps:
            measured = max((other for other in self._changes if other <= step), default=None)
            if measured is not None and _forgotten(self._changes[measured]):
                size = difference_text(self._changes[measured])
                reasons[step] = f"at step {measured} the images follow their prompts less: CLIP-T fell by {size}"
        return reasons

    def compromise(self) -> dict[str, Any] | None:
        """The step with the highest DINO x CLIP-T, the usual compromise of subject and prompt; None if not measured."""
        both = {
            step: (values[dino.NAME], values[clip_score.NAME])
            for step, values in self._values.items()
            if step and {clip_score.NAME, dino.NAME} <= values.keys()
        }
        if not both:
            return None
        step = max(both, key=lambda one: math.prod(both[one]))
        likeness, faithfulness = both[step]
        return {"step": step, clip_score.NAME: faithfulness, dino.NAME: likeness, "product": math.prod(both[step])}

    def _encoders(self) -> dict[str, str]:
        """The id of its encoder by the name of every value that can be measured. All processes load them together."""
        ids = {}
        for metric in map(load_metric, self._names):
            with contextlib.suppress(UserError):  # that is told when the metric is left out
                ids[metric.NAME] = self._embedders(metric.ENCODER).encoder.id
        return ids

    def _take_up(self, run: Run, encoders: Mapping[str, str]) -> None:
        """The values of an interrupted run that can be compared with those to come."""
        others = set()
        for row in run.folder.metrics():
            step, name, value = row["step"], row["name"], row["value"]
            encoder = next((one for main, one in encoders.items() if name == main or is_part(name, main)), None)
            if encoder is None:
                continue
            if (row.get("images_id"), row.get("encoder_id")) != (self._scenes.id, encoder):
                others.add(step)
                continue
            self._logged.setdefault(step, set()).add(name)
            if value is not None:
                self._values.setdefault(step, {})[name] = value
                if name == CLIP_CHANGE and row["se"] is not None:
                    self._changes[step] = Difference(value, row["se"], row["n"])
        if others:
            self._say(
                [f"image metrics up to step {max(others)} are {OTHER_IMAGES}: later ones are not compared with them"]
            )

    def _measure_if_due(self, run: Run) -> None:
        if run.step % self._every == 0 or run.step == run.total_steps:
            self._measure_missing(run, run.step)

    def _measure_missing(self, run: Run, step: int) -> None:
        # The main process decides: others may not see its disk.
        state: Any = None
        if run.accelerator.is_main_process:
            logged = self._logged.get(step, set())
            missing = [name for name in self._names if load_metric(name).NAME not in logged]
            state = (missing, self._scenes.problem(step), self._scenes.problem(0))
        missing, problem, base_problem = tell_everyone(state)
        if not missing:
            return
        if problem:
            self._say([f"step {step}: no image metrics, as {problem}"])
            return
        if base_problem:
            self._say([f"nothing is compared with the base model's images: {base_problem}"])
        self._measure(run, step, missing, with_base=not base_problem)

    def _measure(self, run: Run, step: int, names: Sequence[str], *, with_base: bool) -> None:
        gallery = self._scenes.gallery(step, with_base=with_base)
        change = None
        try:
            with run.memory.stage("image metrics"):
                measurement = measure(names, gallery, self._embedders)
                if step and with_base and any(value.name == clip_score.NAME for value in measurement.values):
                    change = self._change(gallery)
        except UserError as error:  # every process has it; the training does not depend on these numbers
            self._say([f"no image metrics: {error}"])
            return
        finally:
            self._embedders.put_away()
        self._say(measurement.notes)
        if run.accelerator.is_main_process:
            self._log(run, step, measurement.values, change)

    def _log(self, run: Run, step: int, values: Sequence[Value], change: tuple[Difference, str] | None) -> None:
        about = {"images_id": self._scenes.id}
        for value in values:
            more = about if value.n_other is None else {**about, "n_other": value.n_other}
            run.folder.log_all(step, {value.name: value.value}, n=value.n, encoder_id=value.encoder_id, **more)
        found = {value.name: value.value for value in values if math.isfinite(value.value)}
        self._values.setdefault(step, {}).update(found)
        if change and math.isfinite(change[0].mean + change[0].se):
            difference, encoder_id = change
            self._changes[step] = difference
            more = {**about, "se": difference.se, "encoder_id": encoder_id}
            run.folder.log_all(step, {CLIP_CHANGE: difference.mean}, n=difference.n, **more)
        if step == run.step:  # trackers take no step of the past
            run.accelerator.log(found, step=step)

    def _change(self, gallery: MeasuredImages) -> tuple[Difference, str]:
        """How CLIP-T differs from the base model's, and which encoder sees it so."""
        embedder = self._embedders(_ClipChange.ENCODER)
        reading = read(_ClipChange(), gallery, embedder)
        return Difference(reading.value, reading.parts["se"], reading.n), embedder.encoder.id

    def _say(self, notes: Sequence[str]) -> None:
        for note in notes:
            if note not in self._noted:
                self._noted.add(note)
                self._note(note)


def _forgotten(change: Difference) -> bool:
    return change.mean + CLEAR * change.se < -LARGEST_DROP
