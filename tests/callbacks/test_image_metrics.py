"""What image metrics have to say in the choice of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from PIL import Image

from dreamlora.callbacks import image_metrics
from dreamlora.callbacks.image_metrics import CLIP_CHANGE, ImageMetricsCallback, Scenes
from dreamlora.evaluation.measure import Measurement, Value
from dreamlora.metrics import clip_score, dino
from dreamlora.runfolder import RunFolder, append_jsonl
from dreamlora.sampling.sampler import SamplePlan

PLAN = SamplePlan(("a sks dog", "a dog"), 2, 3.0)
ROW = {"prompt_index": 0, "image_index": 0, "prompt": "a dog", "seed": 42, "file": "p00.png"}
"""What a row of samples.jsonl has besides its step."""


def knowing(folder: RunFolder, rows: dict[int, dict[str, float]], se: float = 0.01) -> ImageMetricsCallback:
    """A callback of a resumed run for which these values were logged."""
    folder.path.mkdir(exist_ok=True)
    for step, values in rows.items():
        folder.log_all(step, values, n=2, **({"se": se} if CLIP_CHANGE in values else {}))
    scenes = Scenes(folder.samples, PLAN, (), (), (), ())
    callback = ImageMetricsCallback(["clip_score"], 50, scenes, None, list)  # type: ignore[arg-type]
    callback._take_up(SimpleNamespace(folder=folder))  # type: ignore[arg-type]
    return callback


@pytest.mark.parametrize(
    ("drop", "refused"), [(0.05, True), (0.041, True), (0.039, False), (0.0, False), (-0.1, False)]
)
def test_a_clear_fall_of_the_clip_score_is_a_veto(tmp_path: Path, drop: float, refused: bool) -> None:
    """More than 0.02 by more than two standard errors, which are 0.01 each here."""
    callback = knowing(RunFolder(tmp_path), {50: {CLIP_CHANGE: 0.0}, 100: {CLIP_CHANGE: -drop}})
    assert list(callback.vetoes([0, 25, 50, 75, 100, 125])) == ([100, 125] if refused else [])


def test_the_last_measurement_counts(tmp_path: Path) -> None:
    callback = knowing(RunFolder(tmp_path), {50: {CLIP_CHANGE: -0.5}, 100: {CLIP_CHANGE: 0.1}})
    (veto,) = callback.vetoes([25, 75, 100]).items()
    assert veto == (
        75,
        "at step 50 the images follow their prompts less: CLIP-T fell by 0.5 (50.0 paired standard errors)",
    )


def test_a_change_that_is_not_finite_says_nothing(tmp_path: Path) -> None:
    """A resumed run reads it as None."""
    rows = {50: {CLIP_CHANGE: -0.5}, 100: {CLIP_CHANGE: math.nan, dino.NAME: math.inf}}
    assert list(knowing(RunFolder(tmp_path), rows, se=math.nan).vetoes([100])) == []
    assert list(knowing(RunFolder(tmp_path / "other"), rows).vetoes([100])) == [100]


def test_the_compromise_is_the_highest_product_of_trained_steps(tmp_path: Path) -> None:
    rows = {
        0: {dino.NAME: 0.9, clip_score.NAME: 0.9},
        50: {dino.NAME: 0.5, clip_score.NAME: 0.3},
        100: {dino.NAME: 0.6, clip_score.NAME: 0.2},
    }
    found = knowing(RunFolder(tmp_path), rows).compromise()
    assert found is not None and (found["step"], found["product"]) == (50, pytest.approx(0.15))
    assert knowing(RunFolder(tmp_path / "other"), {50: {clip_score.NAME: 0.3}}).compromise() is None


def test_images_that_are_not_finite_are_not_measured(tmp_path: Path) -> None:
    scenes = Scenes(tmp_path, PLAN, (), (), (), ())
    rows: list[dict[str, Any]] = [
        {"step": 5},
        {"step": 5, "problem": "not finite"},
        {"step": 6},
        {"step": 6},
        {"step": 7},
    ]
    append_jsonl(tmp_path / "samples.jsonl", [{**ROW, **row} for row in rows])
    assert scenes.problem(5) == "1 of 2 images are not finite"
    assert scenes.problem(6) is None
    assert scenes.problem(7) == "images are missing"


def test_a_broken_base_image_is_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 1 is measured, but nothing is compared with the images of step 0, and the person is told."""
    PartialState(cpu=True)
    rows: list[dict[str, Any]] = [{"step": 0, "problem": "black"}, {"step": 0}, {"step": 1}, {"step": 1}]
    append_jsonl(tmp_path / "samples.jsonl", [{**ROW, **row} for row in rows])
    for step in (0, 1):
        folder = tmp_path / f"step_{step:06d}"
        folder.mkdir()
        for item in PLAN.items():
            Image.new("RGB", (8, 8)).save(folder / f"{item.name}.png")
    galleries: list[Any] = []
    value = Value(clip_score.NAME, 0.3, "clip", 2, None)
    monkeypatch.setattr(
        image_metrics, "measure", lambda names, gallery, _: galleries.append(gallery) or Measurement([value])
    )
    notes: list[str] = []
    scenes = Scenes(tmp_path, PLAN, (), (), (), ())
    callback = ImageMetricsCallback(["clip_score"], 1, scenes, None, notes.append)  # type: ignore[arg-type]
    accelerator = SimpleNamespace(is_main_process=True, log=lambda *_, **__: None)
    run: Any = SimpleNamespace(folder=RunFolder(tmp_path), accelerator=accelerator, step=0, total_steps=1)
    callback.on_start(run)
    run.step = 1
    callback.on_step(run, None)  # type: ignore[arg-type]
    (gallery,) = galleries
    assert len(gallery.generated) == 2 and not gallery.base
    assert notes == [
        "step 0: no image metrics, as 1 of 2 images are black",
        "nothing is compared with the base model's images: 1 of 2 images are black",
    ]
    assert callback.vetoes([1]) == {}
