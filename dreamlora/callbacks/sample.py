"""When samples are drawn, and how they lie in the run folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamlora.callbacks.trackers import Shown, trackers_of
from dreamlora.callbacks.weights import before_first_step
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.files import replacing, write_atomically
from dreamlora.interfaces import StepResult
from dreamlora.jsonl import read_jsonl
from dreamlora.lora.assistant import without_assistant
from dreamlora.pictures import own_picture
from dreamlora.processes import gather_lists, tell_everyone
from dreamlora.sampling.grid import MAX_REFERENCES, grid_of_run
from dreamlora.sampling.recorded import motif_of
from dreamlora.sampling.sampler import Drawn, SampleItem, SamplePlan, draw
from dreamlora.sampling.schedulers import deterministic
from dreamlora.sampling.shown import digest, keep
from dreamlora.schemas import SAMPLE_ROW
from dreamlora.training.loop import Run

REFERENCE_SIDE = 256

logger = logging.getLogger(__name__)


class SampleCallback:
    """Draws the plan at step 0, every ``every`` steps and at the end; then renews grid.png and timelapse.webp.

    The processes share the images. A step that is complete on disk is not drawn again; what it shows of other prompts,
    seeds or settings stays.

    Args:
        plan: what is drawn.
        every: steps between two drawings; 0: nothing is drawn.
        references: training images for the strip above the grid; small copies are kept in the run folder.
        folder: of the images; None: samples/. Images elsewhere are not shown: they have no grid, no animation.
    """

    def __init__(
        self,
        plan: SamplePlan,
        every: int,
        references: Sequence[ImageRecord] = (),
        folder: Path | None = None,
    ) -> None:
        self._plan = plan
        self._every = every
        self._references = references
        self._elsewhere = folder

    def on_start(self, run: Run) -> None:
        """Draw the base model; after a resume only what is missing, such as prompts that it was not drawn with."""
        if not self._every:
            return
        if run.accelerator.is_main_process:
            keep(self._plan.shown, run.folder)
            if not self._elsewhere:
                self._keep_references(run)
        if run.step and not self._is_complete(run, 0):
            if run.accelerator.is_main_process:
                logger.info(
                    "the base model was not drawn with these prompts, seeds and settings: it is drawn now; for steps "
                    "before %d they stay empty",
                    run.step,
                )
            with before_first_step(run):
                self._draw(run, 0)
        self._draw_if_due(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Draw if it is time."""
        self._draw_if_due(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step drew."""

    def _draw_if_due(self, run: Run) -> None:
        if not self._every or (run.step % self._every and run.step != run.total_steps):
            return
        rows = [] if self._is_complete(run, run.step) else self._draw(run, run.step)
        if run.accelerator.is_main_process and not self._elsewhere:
            grid_of_run(run.folder)
            self._show(run, rows, run.step)

    def _folder(self, run: Run) -> Path:
        return self._elsewhere or run.folder.samples

    def _file(self, run: Run, step: int, item: SampleItem) -> str:
        """Of an image, relative to the folder."""
        return f"{run.folder.sample_dir(step).name}/{self._plan.file_name(item)}"

    def _is_complete(self, run: Run, step: int) -> bool:
        folder, complete = self._folder(run), False
        if run.accelerator.is_main_process:  # it decides: others may not see its disk
            known = {row["file"] for row in read_jsonl(folder / run.folder.samples_file.name, SAMPLE_ROW)}
            files = [self._file(run, step, item) for item in self._plan.items()]
            complete = all(file in known and (folder / file).exists() for file in files)
        return bool(tell_everyone(complete))

    def _draw(self, run: Run, step: int) -> list[dict[str, Any]]:
        """Draw the plan with the model as it is, as the images of a step; their rows of samples.jsonl."""
        with run.memory.stage("drawing samples"):
            try:
                rows = gather_lists(self._drawn(run, step))
            finally:
                run.put_away()
        if run.accelerator.is_main_process:
            self._store(run, rows)
        return rows

    def _drawn(self, run: Run, step: int) -> list[dict[str, Any]]:
        """Draw and write this process's images; their rows of samples.jsonl."""
        accelerator, pipeline = run.accelerator, run.pipeline()
        scheduler = type(deterministic(pipeline.scheduler)[0]).__name__

        def asked(prompts: Sequence[str]) -> dict[str, Any]:
            arguments = run.call_arguments(prompts).items()
            return {
                name: value.to(accelerator.device) if isinstance(value, Tensor) else value for name, value in arguments
            }

        rows = []
        denoiser = accelerator.unwrap_model(run.model).denoiser
        with accelerator.autocast(), without_assistant(denoiser):
            share = draw(pipeline, self._plan, asked, accelerator.process_index, accelerator.num_processes)
            for drawn in share:
                rows.append({**self._write(run, step, drawn), "scheduler": scheduler})
        return rows

    def _write(self, run: Run, step: int, drawn: Drawn) -> dict[str, Any]:
        item, plan = drawn.item, self._plan
        name = self._file(run, step, item)
        file = self._folder(run) / name
        with replacing(file) as temporary:
            drawn.image.save(temporary)
        return {
            "step": step,
            "prompt_index": item.prompt_index,
            "image_index": item.image_index,
            "prompt": item.prompt,
            "seed": item.seed,
            "file": name,
            "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale,
            "lora_scale": 1.0,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            **({"negative_prompt": plan.negative_prompt} if plan.negative_prompt else {}),
            **({"conditioning": digest(plan.shown[item.prompt])} if plan.shown else {}),
            **({"vae_tiling": True} if plan.limits.tiles else {}),
            **({"problem": drawn.problem} if drawn.problem else {}),
        }

    def _store(self, run: Run, rows: list[dict[str, Any]]) -> None:
        """Put rows into samples.jsonl, in place of those that showed the same; of a step, the plan's come first."""
        file = self._folder(run) / run.folder.samples_file.name
        new = {(row["step"], motif_of(row)) for row in rows}
        others = [row for row in read_jsonl(file, SAMPLE_ROW) if (row["step"], motif_of(row)) not in new]
        planned = {self._plan.file_name(item) for item in self._plan.items()}

        def place(row: dict[str, Any]) -> tuple[int, bool, int, int]:
            return row["step"], Path(row["file"]).name not in planned, row["prompt_index"], row["image_index"]

        write_atomically(file, "".join(json.dumps(row) + "\n" for row in sorted([*rows, *others], key=place)))

    def _show(self, run: Run, rows: list[dict[str, Any]], step: int) -> None:
        """Send the images and the grid to the trackers."""
        if not (trackers := trackers_of(run)):
            return
        folder = run.folder
        there = [(row, folder.samples / row["file"]) for row in rows]
        samples = [
            Shown(file.stem, row["prompt"], own_picture(file, folder.path))
            for row, file in there
            if file.exists()  # else it was drawn on another machine
        ]
        grid = own_picture(folder.grid_file, folder.path) if folder.grid_file.exists() else None
        for tracker in trackers if samples else []:
            tracker.log_samples(samples, grid, step)

    def _keep_references(self, run: Run) -> None:
        folder = run.folder.reference_dir
        if folder.exists():
            return
        for number, record in enumerate(self._references[:MAX_REFERENCES]):
            try:
                small = record.open()
            except UserError as error:
                logger.warning("an image is left out of the strip of training images: %s", error)
                continue
            small.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE))
            with replacing(folder / f"{number:02d}.png") as temporary:
                small.save(temporary)
