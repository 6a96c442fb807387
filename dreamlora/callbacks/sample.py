"""When samples are drawn, and how they lie in the run folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.files import replacing, write_atomically
from dreamlora.interfaces import StepResult
from dreamlora.processes import gather_lists, tell_everyone
from dreamlora.runfolder import read_jsonl
from dreamlora.sampling.grid import MAX_REFERENCES, grid_of_run
from dreamlora.sampling.sampler import Drawn, SamplePlan, draw
from dreamlora.sampling.schedulers import deterministic
from dreamlora.training.loop import Run

REFERENCE_SIDE = 256

logger = logging.getLogger(__name__)


class SampleCallback:
    """Draws the plan at step 0, every ``every`` steps and at the end; then renews grid.png and timelapse.webp.

    The processes share the images. A step that is complete on disk is not drawn again.

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
        """Draw the base model; after a resume only what is missing."""
        if self._every and not self._elsewhere and run.accelerator.is_main_process:
            self._keep_references(run)
        self._draw_if_due(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Draw if it is time."""
        self._draw_if_due(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step drew."""

    def _draw_if_due(self, run: Run) -> None:
        if not self._every or (run.step % self._every and run.step != run.total_steps):
            return
        # The main process decides: others may not see its disk.
        complete = tell_everyone(self._complete(run))
        rows = [] if complete else gather_lists(self._draw(run))
        if run.accelerator.is_main_process:
            if rows:
                self._store(run, rows)
            if not self._elsewhere:
                self._show(run, rows)
                grid_of_run(run.folder)

    def _folder(self, run: Run) -> Path:
        return self._elsewhere or run.folder.samples

    def _complete(self, run: Run) -> bool:
        file = self._folder(run) / run.folder.samples_file.name
        rows = [row for row in read_jsonl(file) if row["step"] == run.step]
        drawn = {(row["prompt"], row["seed"]) for row in rows if (self._folder(run) / row["file"]).exists()}
        return drawn >= {(item.prompt, item.seed) for item in self._plan.items()} and all(
            row.get("num_inference_steps") == self._plan.num_inference_steps
            and row.get("guidance_scale") == self._plan.guidance_scale
            for row in rows
        )

    def _draw(self, run: Run) -> list[dict[str, Any]]:
        """Draw and write this process's images; their rows of samples.jsonl."""
        accelerator, pipeline = run.accelerator, run.pipeline()
        scheduler = type(deterministic(pipeline.scheduler)[0]).__name__

        def embed(prompts: Sequence[str]) -> dict[str, Any]:
            arguments = run.call_arguments(prompts).items()
            return {
                name: value.to(accelerator.device) if isinstance(value, Tensor) else value for name, value in arguments
            }

        rows = []
        with accelerator.autocast():
            share = draw(pipeline, self._plan, embed, accelerator.process_index, accelerator.num_processes)
            for drawn in share:
                rows.append({**self._write(run, drawn), "scheduler": scheduler})
        return rows

    def _write(self, run: Run, drawn: Drawn) -> dict[str, Any]:
        item, plan = drawn.item, self._plan
        folder = self._folder(run)
        file = folder / run.folder.sample_dir(run.step).name / f"{item.name}.png"
        with replacing(file) as temporary:
            drawn.image.save(temporary)
        return {
            "step": run.step,
            "prompt_index": item.prompt_index,
            "image_index": item.image_index,
            "prompt": item.prompt,
            "seed": item.seed,
            "file": file.relative_to(folder).as_posix(),
            "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale,
            "lora_scale": 1.0,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            **({"negative_prompt": plan.negative_prompt} if plan.negative_prompt else {}),
            **({"problem": drawn.problem} if drawn.problem else {}),
        }

    def _store(self, run: Run, rows: list[dict[str, Any]]) -> None:
        """Put the step's rows into samples.jsonl, in place of any that it had."""
        file = self._folder(run) / run.folder.samples_file.name
        others = [row for row in read_jsonl(file) if row["step"] != run.step]
        merged = sorted([*others, *rows], key=lambda row: (row["step"], row["prompt_index"], row["image_index"]))
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in merged))

    def _show(self, run: Run, rows: list[dict[str, Any]]) -> None:
        """Send the images to the trackers that take images (TensorBoard, wandb, ...)."""
        trackers = [tracker for tracker in run.accelerator.trackers if hasattr(tracker, "log_images")]
        for row in rows if trackers else []:
            file = run.folder.samples / row["file"]
            if not file.exists():  # drawn on another machine
                continue
            with Image.open(file) as image:
                pixels = np.asarray(image)[None]
            for tracker in trackers:
                # TensorBoard takes channels first unless told otherwise; the others do not know the word
                order = {"dataformats": "NHWC"} if getattr(tracker, "name", "") == "tensorboard" else {}
                tracker.log_images({f"samples/{file.stem}": pixels}, step=run.step, **order)

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
