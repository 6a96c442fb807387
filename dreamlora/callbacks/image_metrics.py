"""When image metrics (CLIP score, DINO, KID, ...) are computed from the images of a step, and where they go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.eval_loss.items import Difference, paired_difference
from dreamlora.eval_loss.selection import difference_text
from dreamlora.evaluation.embedders import Embedders
from dreamlora.evaluation.measure import MeasuredImages, Value, measure, read
from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading, StepResult
from dreamlora.metric_names import is_image_metric, of_metric
from dreamlora.metrics import clip_score, dino
from dreamlora.metrics._vectors import paired_cosines
from dreamlora.processes import tell_everyone
from dreamlora.runfolder import read_jsonl
from dreamlora.sampling.sampler import SamplePlan
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

    def images(self, step: int) -> list[ImageRecord]:
        """What was drawn at a step, in the order in which processes share the drawing: each reads its own files."""
        files = [self.folder / f"step_{step:06d}" / f"{item.name}.png" for item in self.plan.items()]
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
        rows = [row for row in read_jsonl(self.folder / "samples.jsonl") if row["step"] == step]
        wrong = [row for row in rows if row.get("problem")]
        if wrong:
            return f"{len(wrong)} of {len(rows)} images are {wrong[0]['problem']}"
        return None if len(rows) >= len(self.plan.items()) else "images are missing"


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

    All processes share the encoding. A metric that cannot be computed is left out, with a note that says why.

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
        self._values: dict[int, dict[str, float]] = {}
        self._changes: dict[int, Difference] = {}

    def on_start(self, run: Run) -> None:
        """Measure the base model; after a resume only what is missing."""
        if run.accelerator.is_main_process:
            self._take_up(run)
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

    def _take_up(self, run: Run) -> None:
        for row in run.folder.metrics():
            if is_image_metric(row["name"]) and row["value"] is not None:
                self._values.setdefault(row["step"], {})[row["name"]] = row["value"]
            if row["name"] == CLIP_CHANGE and None not in (row["value"], row["se"]):
                self._changes[row["step"]] = Difference(row["value"], row["se"], row["n"])

    def _measure_if_due(self, run: Run) -> None:
        if run.step % self._every and run.step != run.total_steps:
            return
        # The main process decides: others may not see its disk.
        state: Any = None
        if run.accelerator.is_main_process:
            state = (run.step in self._values, self._scenes.problem(run.step), self._scenes.problem(0))
        known, problem, base_problem = tell_everyone(state)
        if problem and not known:
            self._say([f"step {run.step}: no image metrics, as {problem}"])
        elif not known:
            if base_problem:
                self._say([f"nothing is compared with the base model's images: {base_problem}"])
            self._measure(run, with_base=not base_problem)

    def _measure(self, run: Run, *, with_base: bool) -> None:
        gallery = self._scenes.gallery(run.step, with_base=with_base)
        change = None
        try:
            measurement = measure(self._names, gallery, self._embedders)
            if run.step and with_base and any(value.name == clip_score.NAME for value in measurement.values):
                change = self._change(gallery)
        except UserError as error:  # every process has it; the training does not depend on these numbers
            self._say([f"no image metrics: {error}"])
            return
        self._say(measurement.notes)
        if run.accelerator.is_main_process:
            self._log(run, measurement.values, change)

    def _log(self, run: Run, values: Sequence[Value], change: tuple[Difference, str] | None) -> None:
        for value in values:
            more = {} if value.n_other is None else {"n_other": value.n_other}
            run.folder.log_all(run.step, {value.name: value.value}, n=value.n, encoder_id=value.encoder_id, **more)
        self._values[run.step] = {value.name: value.value for value in values if math.isfinite(value.value)}
        if change and math.isfinite(change[0].mean + change[0].se):
            difference, encoder_id = change
            self._changes[run.step] = difference
            run.folder.log_all(
                run.step, {CLIP_CHANGE: difference.mean}, n=difference.n, se=difference.se, encoder_id=encoder_id
            )
        run.accelerator.log(self._values[run.step], step=run.step)

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
