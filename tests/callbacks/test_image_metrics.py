"""What image metrics have to say in the choice of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from dreamlora.callbacks import image_metrics
from dreamlora.callbacks.image_metrics import CLIP_CHANGE, ImageMetricsCallback, Scenes
from dreamlora.config import Encoders
from dreamlora.data.cache import TensorCache
from dreamlora.evaluation.embedders import Embedders, EncoderPlace
from dreamlora.evaluation.measure import Measurement, Value
from dreamlora.jsonl import append_jsonl
from dreamlora.memory import StageMemory
from dreamlora.metric_names import OTHER_IMAGES
from dreamlora.metrics import clip_score, dino
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.sampler import SamplePlan

PLAN = SamplePlan(("a sks dog", "a dog"), 2, 3.0)
ROW = {"prompt_index": 0, "image_index": 0, "prompt": "a dog", "seed": 42}
"""What a row of samples.jsonl has besides its step and file."""


def scenes_in(folder: Path, plan: SamplePlan = PLAN) -> Scenes:
    return Scenes(folder, plan, ["a dog"] * len(plan.items()), [True] * len(plan.items()), (), ())


def knowing(
    folder: RunFolder,
    rows: dict[int, dict[str, float]],
    se: float = 0.01,
    plan: SamplePlan = PLAN,
    encoder: str = "clip",
    notes: list[str] | None = None,
) -> ImageMetricsCallback:
    """A callback of a resumed run with ``PLAN``, for which these values of ``plan`` and ``encoder`` were logged."""
    folder.path.mkdir(exist_ok=True)
    about = {"images_id": scenes_in(folder.samples, plan).id, "encoder_id": encoder}
    for step, values in rows.items():
        folder.log_all(step, values, n=2, **about, **({"se": se} if CLIP_CHANGE in values else {}))
    note = ([] if notes is None else notes).append
    callback = ImageMetricsCallback(["clip_score", "dino"], 50, scenes_in(folder.samples), None, note)  # type: ignore[arg-type]
    callback._take_up(SimpleNamespace(folder=folder), {clip_score.NAME: "clip", dino.NAME: "clip"})  # type: ignore[arg-type]
    return callback


@pytest.mark.parametrize(
    ("plan", "encoder", "same"),
    [
        (PLAN, "clip", True),
        (replace(PLAN, prompts=("a sks dog", "a cat")), "clip", False),
        (replace(PLAN, prompts=PLAN.prompts[::-1]), "clip", False),
        (replace(PLAN, prompts=PLAN.prompts[:1]), "clip", False),
        (replace(PLAN, seed=7), "clip", False),
        (replace(PLAN, num_images_per_prompt=2), "clip", False),
        (replace(PLAN, guidance_scale=2.0), "clip", False),
        (replace(PLAN, num_inference_steps=3), "clip", False),
        (replace(PLAN, negative_prompt="blurry"), "clip", False),
        (replace(PLAN, width=64, height=64), "clip", False),
        (replace(PLAN, batch_size=1), "clip", True),
        (PLAN, "another clip", False),
    ],
)
def test_values_of_other_images_or_by_another_encoder_have_no_say(
    tmp_path: Path, plan: SamplePlan, encoder: str, same: bool
) -> None:
    notes: list[str] = []
    values = {CLIP_CHANGE: -0.5, clip_score.NAME: 0.3, dino.NAME: 0.5}
    callback = knowing(RunFolder(tmp_path), {50: values}, plan=plan, encoder=encoder, notes=notes)
    assert bool(callback.vetoes([50, 100])) == same
    assert (callback.compromise() is not None) == same
    assert notes == (
        [] if same else [f"image metrics up to step 50 are {OTHER_IMAGES}: later ones are not compared with them"]
    )


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
    scenes = scenes_in(tmp_path)
    (a, b), (c, d), (e, _), (f, g) = map(scenes.files, (5, 6, 7, 8))
    rows: list[dict[str, Any]] = [{"file": a}, {"file": b, "problem": "not finite"}, {"file": c}, {"file": d}]
    rows += [{"file": e}, {"file": "step_000007/of_another_prompt.png"}]
    rows += [{"file": f}, {"file": g}, {"file": "step_000008/of_another_prompt.png", "problem": "black"}]
    append_jsonl(tmp_path / "samples.jsonl", [{**ROW, "step": 5, **row} for row in rows])
    assert scenes.problem(5) == "1 of 2 images are not finite"
    assert scenes.problem(6) is None
    assert scenes.problem(7) == "images are missing"
    assert scenes.problem(8) is None


def test_a_broken_base_image_is_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 1 is measured, but nothing is compared with the images of step 0, and the person is told."""
    PartialState(cpu=True)
    scenes = scenes_in(tmp_path)
    for step in (0, 1):
        (tmp_path / f"step_{step:06d}").mkdir()
        for file in scenes.files(step):
            Image.new("RGB", (8, 8)).save(tmp_path / file)
            problem = {} if step else {"problem": "black"}
            append_jsonl(tmp_path / "samples.jsonl", [{**ROW, "step": step, "file": file, **problem}])
    cpu = torch.device("cpu")
    place, memory = EncoderPlace(cpu, TensorCache(tmp_path)), StageMemory(cpu, [])
    galleries: list[Any] = []
    value = Value(clip_score.NAME, 0.3, "clip", 2, None)
    monkeypatch.setattr(
        image_metrics, "measure", lambda names, gallery, _: galleries.append(gallery) or Measurement([value])
    )
    notes: list[str] = []
    callback = ImageMetricsCallback(["clip_score"], 1, scenes, Embedders(Encoders(), True, place), notes.append)
    accelerator = SimpleNamespace(is_main_process=True, log=lambda *_, **__: None)
    run: Any = SimpleNamespace(
        folder=RunFolder(tmp_path), accelerator=accelerator, step=0, total_steps=1, memory=memory
    )
    put_away: list[int] = []
    monkeypatch.setattr(Embedders, "put_away", lambda self: put_away.append(run.step))
    callback.on_start(run)
    run.step = 1
    callback.on_step(run, None)  # type: ignore[arg-type]
    assert put_away == [1], "once what can be measured is measured"
    (gallery,) = galleries
    assert len(gallery.generated) == 2 and not gallery.base
    assert notes == [
        "step 0: no image metrics, as 2 of 2 images are black",
        "nothing is compared with the base model's images: 2 of 2 images are black",
    ]
    assert callback.vetoes([1]) == {}
