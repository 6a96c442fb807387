"""The callback, with a run that is just what it looks at."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import ExifTags, Image

from dreamlora.callbacks.sample import SampleCallback
from dreamlora.callbacks.trackers import Beginning, RunTracker, Shown
from dreamlora.data.folder import load_folder
from dreamlora.data.images import ImageRecord
from dreamlora.interfaces import StepResult
from dreamlora.memory import StageMemory
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.canvas import GAP, MARGIN
from dreamlora.sampling.grid import CELL, GUTTER
from dreamlora.sampling.sampler import SamplePlan

PLAN = SamplePlan(("a photo of sks dog", "a dog"), 2, 3.0)


class FakeRun:
    """The real small pipeline; everything else is what callbacks see of ``training.loop.Run``."""

    def __init__(self, folder: Path, pipeline: Any, step: int = 0) -> None:
        self.folder = RunFolder(folder)
        self.accelerator = Accelerator(cpu=True)
        self.step = step
        self.total_steps = 5
        self.drawn = 0
        self.model = torch.nn.Module()
        self.model.denoiser = pipeline.unet
        self.memory = StageMemory(torch.device("cpu"), [])
        self.put_away_at: list[int] = []
        self._pipeline = pipeline

    def pipeline(self) -> Any:
        return self._pipeline

    def put_away(self) -> None:
        self.put_away_at.append(self.step)

    def call_arguments(self, prompts: list[str]) -> dict[str, Any]:
        self.drawn += len(prompts)
        embeds, negative = self._pipeline.encode_prompt(prompts, "cpu", 1, True)
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}

    def rows(self) -> list[dict[str, Any]]:
        return self.folder.sample_rows()


@pytest.fixture(scope="module")
def pipeline(sd_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(sd_folder)


def go(callback: SampleCallback, run: FakeRun, until: int) -> None:
    """What the loop does."""
    callback.on_start(run)  # type: ignore[arg-type]
    while run.step < until:
        run.step += 1
        callback.on_step(run, StepResult(run.step, 1.0, 1.0, 1e-3, 0.1))  # type: ignore[arg-type]
    callback.on_end(run)  # type: ignore[arg-type]


def test_draws_at_the_start_every_n_steps_and_at_the_end(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    run = FakeRun(tmp_path, pipeline)
    state = torch.get_rng_state()
    go(SampleCallback(PLAN, 2), run, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(row["step"], row["prompt_index"]) for row in run.rows()] == [(s, p) for s in (0, 2, 4, 5) for p in (0, 1)]
    first = run.rows()[0]
    assert re.fullmatch(r"step_000000/p00_s42-[0-9a-f]{12}\.png", first["file"])
    data = (run.folder.samples / first["file"]).read_bytes()
    assert first["sha256"] == hashlib.sha256(data).hexdigest()
    assert {key: first[key] for key in first if key not in ("sha256", "file")} == {
        "step": 0,
        "prompt_index": 0,
        "image_index": 0,
        "prompt": "a photo of sks dog",
        "seed": 42,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "lora_scale": 1.0,
        "scheduler": "DDIMScheduler",
    }
    assert run.put_away_at == [0, 2, 4, 5], "the autoencoder leaves the device after each drawing"
    with Image.open(run.folder.timelapse_file) as film:
        assert film.n_frames == 4
    assert run.folder.grid_file.exists()
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".")]


def test_the_same_weights_give_the_same_images_at_every_step(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    run = FakeRun(tmp_path, pipeline)
    go(SampleCallback(PLAN, 5), run, 5)
    hashes = [(row["prompt_index"], row["sha256"]) for row in run.rows()]
    assert hashes[:2] == hashes[2:]


def test_a_resumed_run_draws_what_is_missing_and_gets_the_same_files(
    tmp_path: Path, pipeline: StableDiffusionPipeline
) -> None:
    whole = FakeRun(tmp_path / "whole", pipeline)
    go(SampleCallback(PLAN, 2), whole, 5)
    killed = FakeRun(tmp_path / "killed", pipeline)
    go(SampleCallback(PLAN, 2), killed, 4)
    killed.folder.forget_after(2)
    (gone,) = killed.folder.sample_dir(2).glob("p01_s43-*.png")
    gone.unlink()
    resumed = FakeRun(tmp_path / "killed", pipeline, step=2)
    go(SampleCallback(PLAN, 2), resumed, 5)
    assert resumed.drawn == 6, "step 2 again, 4 and 5"
    assert resumed.rows() == whole.rows()
    again = FakeRun(tmp_path / "killed", pipeline, step=5)
    go(SampleCallback(PLAN, 2), again, 5)
    assert again.drawn == 0


@pytest.mark.parametrize(
    "other",
    [
        SamplePlan(PLAN.prompts, 1, 3.0),
        SamplePlan(PLAN.prompts, 2, 2.0),
        SamplePlan(PLAN.prompts, 2, 3.0, seed=7),
        SamplePlan(PLAN.prompts, 2, 3.0, negative_prompt="blurry"),
        SamplePlan(PLAN.prompts[::-1], 2, 3.0),
        SamplePlan(("a cat",), 2, 3.0),
    ],
)
def test_another_plan_is_drawn_besides(tmp_path: Path, pipeline: StableDiffusionPipeline, other: SamplePlan) -> None:
    """No file takes the place of another, and the plan's own come first."""
    run = FakeRun(tmp_path, pipeline)
    go(SampleCallback(PLAN, 5), run, 0)
    before = {row["file"]: (run.folder.samples / row["file"]).read_bytes() for row in run.rows()}
    go(SampleCallback(other, 5), run, 0)
    assert [row["prompt"] for row in run.rows()] == [*other.prompts, *PLAN.prompts]
    assert {file: (run.folder.samples / file).read_bytes() for file in before} == before
    assert len({row["file"] for row in run.rows()}) == len(run.rows())
    with Image.open(run.folder.grid_file) as picture:
        assert picture.width == 2 * MARGIN + GUTTER + len(run.rows()) * (CELL + GAP) - GAP


def test_the_negative_prompt_is_noted(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    run = FakeRun(tmp_path, pipeline)
    go(SampleCallback(SamplePlan(("a dog",), 1, 3.0, negative_prompt="blurry"), 5), run, 0)
    assert run.rows()[0]["negative_prompt"] == "blurry"


def test_never(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    run = FakeRun(tmp_path, pipeline)
    go(SampleCallback(PLAN, 0, [ImageRecord.from_image("photo", "a dog", Image.new("RGB", (8, 8)))]), run, 5)
    assert run.drawn == 0
    assert not list(tmp_path.iterdir())


def test_keeps_small_copies_of_the_training_images(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    """As they are trained on: upright, transparency on white, from whatever place."""
    photos = tmp_path / "photos"
    photos.mkdir()
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (400, 800), "red").save(photos / "a.jpg", exif=turned)
    Image.new("RGB", (8, 8)).save(photos / "b.png")
    records = [
        *load_folder(photos, "a dog").records,
        ImageRecord.from_image("row 3", "a dog", Image.new("RGBA", (64, 64))),
    ]
    (photos / "b.png").unlink()
    run = FakeRun(tmp_path / "run", pipeline)
    go(SampleCallback(PLAN, 5, records), run, 0)
    assert [file.name for file in sorted(run.folder.reference_dir.iterdir())] == ["00.png", "02.png"]
    with Image.open(run.folder.reference_dir / "00.png") as image:
        assert (image.size, image.mode) == ((256, 128), "RGB")
    with Image.open(run.folder.reference_dir / "02.png") as image:
        assert image.getpixel((0, 0)) == (255, 255, 255)


class Recording(RunTracker):
    """Keeps what it is shown."""

    def __init__(self, folder: Path) -> None:
        super().__init__("aim", Beginning("p", "r", "0" * 8, folder), pytest.fail)
        self.shown: list[tuple[int, list[tuple[str, str]], Any]] = []

    def log_samples(self, samples: Sequence[Shown], grid: Image.Image | None, step: int) -> None:
        self.shown.append((step, [(one.name, one.caption) for one in samples], grid))


def test_images_go_to_trackers(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    run, tracker = FakeRun(tmp_path, pipeline), Recording(tmp_path)
    run.accelerator.trackers = [tracker]
    go(SampleCallback(PLAN, 5), run, 0)
    run.accelerator.trackers = []
    [(step, samples, grid)] = tracker.shown
    named = [(PLAN.file_name(item).removesuffix(".png"), item.prompt) for item in PLAN.items()]
    assert (step, samples) == (0, named)
    with Image.open(run.folder.grid_file) as image:
        assert grid.tobytes() == image.convert("RGB").tobytes()
