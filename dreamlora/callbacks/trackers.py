"""What TensorBoard, wandb, trackio and others get of a run, and under which names.

All that metrics.jsonl gets, under its names; those that diffusers' scripts log too under their names as well
(``USUAL``); the drawn samples with their prompts; the grid; and at the end the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from dreamlora.credentials import masked
from dreamlora.metric_names import LEARNING_RATE, TRAIN_LOSS
from dreamlora.training.loop import Run

USUAL = {TRAIN_LOSS: "loss", LEARNING_RATE: "lr"}
"""Names of diffusers' scripts, by ours. Ours are those of transformers' Trainer where that logs the same."""
VALIDATION = "validation"
"""What diffusers' scripts call the images of a step."""
SAMPLES = "samples/"
"""Before the name of a single image."""
GRID = "grid"
REPORT = "report"

Options = Mapping[str, float | str]


@dataclass(frozen=True)
class Shown:
    """A drawn sample.

    Attributes:
        name: the same at every step.
        caption: its prompt.
        image: in RGB.
    """

    name: str
    caption: str
    image: Image.Image


@dataclass(frozen=True)
class Beginning:
    """Where a tracker begins.

    Attributes:
        project: what the tracker puts the run into.
        run_name: what it calls the run.
        run_id: by which it knows the run again.
        folder: for the tracker's files.
        step: done before; above 0 the run goes on.
        sent: steps and names of the values that this tracker got of the run before; ``VALIDATION`` are images.
    """

    project: str
    run_name: str
    run_id: str
    folder: Path
    step: int = 0
    sent: frozenset[tuple[int, str]] = frozenset()


class RunTracker:
    """One of accelerate's trackers as a run uses it; on the main process alone. This one serves those without a class
    of their own.

    A run does not depend on it: when it fails, that is told once, and it gets nothing more.

    Args:
        name: accelerate's.
        beginning: where it begins.
        warn: tells the person something, now and in the report.
    """

    REWINDS: ClassVar[bool] = False
    """Whether it drops by itself what it got of the steps that a resumed run makes again; others keep the first."""

    def __init__(self, name: str, beginning: Beginning, warn: Callable[[str], object]) -> None:
        self.name = name
        self._at = beginning
        self._warn = warn
        self._tracker: Any = None
        self._step = beginning.step

    @property
    def is_on(self) -> bool:
        """Whether it has started and not failed."""
        return self._tracker is not None

    def start(self, options: Options) -> None:
        """Begin or go on, with the options of the run."""
        self._attempt(lambda: setattr(self, "_tracker", self._started(options)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Values by their name in metrics.jsonl."""
        new = {name: value for name, value in values.items() if self.REWINDS or (step, name) not in self._at.sent}
        new |= {usual: new[name] for name, usual in USUAL.items() if name in new}
        self._step = max(self._step, step)
        if new and self.is_on:
            self._attempt(lambda: self._values(new, step))

    def log_samples(self, samples: Sequence[Shown], grid: Image.Image | None, step: int) -> None:
        """The images of a step, and the grid as it is since then."""
        if self.is_on and (self.REWINDS or (step, VALIDATION) not in self._at.sent):
            self._attempt(lambda: self._images(samples, grid, step))

    def log_report(self, page: str, text: str) -> None:
        """The report, as HTML and as Markdown."""
        if self.is_on:
            self._attempt(lambda: self._report(page, text))

    def finish(self) -> None:
        """Send what is left."""
        if self.is_on:
            self._attempt(lambda: self._tracker.finish())
        self._tracker = None

    def _started(self, options: Options) -> Any:
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        place = [str(self._at.folder)] if kind.requires_logging_directory else []
        tracker = kind(self._at.project, *place)
        tracker.start()
        tracker.store_init_configuration(dict(options))
        return tracker

    def _values(self, values: Mapping[str, Any], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def _images(self, samples: Sequence[Shown], grid: Image.Image | None, step: int) -> None:
        if hasattr(self._tracker, "log_images"):
            named = {f"{SAMPLES}{sample.name}": sample.image for sample in samples} | ({GRID: grid} if grid else {})
            self._tracker.log_images({name: np.asarray(image)[None] for name, image in named.items()}, step=step)

    def _report(self, page: str, text: str) -> None:
        """Nothing that all of them take."""

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a library, a network, a disk may raise
            with suppress(Exception):
                self._tracker.finish()
            self._tracker = None
            reason = masked(" ".join(str(error).split())) or type(error).__name__
            self._warn(
                f"{self.name} has failed and gets nothing more of this run: {reason}. The training goes on without it; "
                "metrics.jsonl has all numbers"
            )


class _TensorBoard(RunTracker):
    REWINDS = True

    def _started(self, options: Options) -> Any:
        inside = {"run_name": self._at.project, "logging_dir": str(self._at.folder)}
        # Readers then forget what lies in the folder from this step on, an overwritten run's too.
        tracker = LOGGER_TYPE_TO_CLASS[self.name](**inside, purge_step=self._at.step + 1 if self._at.step else 0)
        tracker.start()
        tracker.tracker.add_hparams(dict(options), {}, run_name=".")  # accelerate's way makes a run of its own of them
        return tracker

    def _images(self, samples: Sequence[Shown], grid: Image.Image | None, step: int) -> None:
        pixels = {sample.name: np.asarray(sample.image) for sample in samples}
        batches = {f"{SAMPLES}{name}": image[None] for name, image in pixels.items()}
        if len({image.shape for image in pixels.values()}) == 1:
            batches[VALIDATION] = np.stack(list(pixels.values()))
        if grid:
            batches[GRID] = np.asarray(grid)[None]
        self._tracker.log_images(batches, step=step, dataformats="NHWC")
        captions = "".join(f"    {sample.name}: {sample.caption}\n" for sample in samples)
        self._tracker.tracker.add_text(f"{SAMPLES}prompts", captions, global_step=step)

    def _report(self, page: str, text: str) -> None:
        self._tracker.tracker.add_text(REPORT, text, global_step=self._step)


class _WandB(RunTracker):
    def _started(self, options: Options) -> Any:
        import wandb

        # What it takes of the machine by itself: the command line, user and host, the output with its paths.
        private = wandb.Settings(console="off", x_disable_meta=True, disable_git=True, save_code=False)
        tracker = LOGGER_TYPE_TO_CLASS[self.name](
            self._at.project,
            name=self._at.run_name,
            id=self._at.run_id,
            resume="allow",
            dir=str(self._at.folder),
            settings=private,
        )
        tracker.start()
        tracker.store_init_configuration(dict(options))
        return tracker

    def _values(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self._tracker.tracker.step:  # it takes none of the past
            self._tracker.log(dict(values), step=step)

    def _images(self, samples: Sequence[Shown], grid: Image.Image | None, step: int) -> None:
        import wandb

        images: dict[str, Any] = {VALIDATION: [wandb.Image(one.image, caption=one.caption) for one in samples]}
        self._values(images | ({GRID: wandb.Image(grid)} if grid else {}), step)

    def _report(self, page: str, text: str) -> None:
        import wandb

        self._tracker.log({REPORT: wandb.Html(page, inject=False, data_is_not_path=True)})


class _Trackio(RunTracker):
    def _started(self, options: Options) -> Any:
        tracker = LOGGER_TYPE_TO_CLASS[self.name](
            self._at.project,
            name=self._at.run_name,
            resume="allow" if self._at.sent else "never",
            config=dict(options),
            embed=False,
        )
        tracker.start()
        return tracker

    def _images(self, samples: Sequence[Shown], grid: Image.Image | None, step: int) -> None:
        import trackio

        images = {f"{SAMPLES}{one.name}": trackio.Image(one.image, caption=one.caption) for one in samples}
        self._values(images | ({GRID: trackio.Image(grid)} if grid else {}), step)

    def _report(self, page: str, text: str) -> None:
        import trackio

        self._values({REPORT: trackio.Html(page)}, self._step)


_OWN: dict[str, type[RunTracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}


def tracker_of(name: str, beginning: Beginning, warn: Callable[[str], object]) -> RunTracker:
    """The tracker that accelerate calls ``name``; it has not started."""
    return _OWN.get(name, RunTracker)(name, beginning, warn)


def trackers_of(run: Run) -> list[RunTracker]:
    """Those that take images, on this process."""
    return [tracker for tracker in run.accelerator.trackers if isinstance(tracker, RunTracker)]
