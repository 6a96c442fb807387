"""What a run is told of its images before a model is loaded, and which class images it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamlora.config import Data, RunConfig
from dreamlora.errors import UserError
from dreamlora.families import qwen_image, sd
from dreamlora.models.parts import Parts
from dreamlora.run import images
from dreamlora.run.context import RunContext
from dreamlora.run.images import RunImages, class_plan, read_images, with_class_images
from dreamlora.runfolder import RunFolder
from dreamlora.training import prior


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos at the resolution of the tests, which is 64."""
    return draw(tmp_path / "photos", {f"{number}.png": (64, 64) for number in range(3)})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "outputs" / "run")


def draw(folder: Path, sizes: dict[str, tuple[int, int]], seed: int = 0, **options: Any) -> Path:
    """Images of noise, each different."""
    random = np.random.default_rng([seed, len(folder.name)])
    for name, (width, height) in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, **options)
    return folder


def context_of(photos: Path, **data: Any) -> RunContext:
    """A context whose models nobody can load."""
    given = Data(
        instance_data_dir=photos, instance_prompt="sks", resolution=64, latents_cache_dir=photos.parent / "cache"
    )
    accelerator = SimpleNamespace(
        is_main_process=True, process_index=0, num_processes=1, mixed_precision="no", device=torch.device("cpu")
    )
    config = replace(RunConfig(), data=replace(given, **data))
    config = replace(config, sample=replace(config.sample, num_inference_steps=1, sample_guidance_scale=1.0))
    source: Any = SimpleNamespace(predictor_id="model", drawer_id="model", text_encoder_device=None)
    parts = Parts(sd, source, accelerator.device, torch.float32)
    return RunContext(config, accelerator, sd, source, parts)  # type: ignore[arg-type]


def told(context: RunContext, word: str) -> str:
    (warning,) = [warning for warning in context.warnings if word in warning]
    return warning


# --- quality ---


def test_small_photos_are_counted_with_the_smallest(photos: Path, run: RunFolder) -> None:
    draw(photos, {"a.png": (63, 400), "b.png": (20, 32), "c.png": (640, 64), "d.png": (32, 32)}, seed=1)
    context = context_of(photos, holdout=0)
    read_images(context, run)
    assert "3 of 7 images are smaller" in told(context, "enlarged")
    assert "at most 3.2 times (b.png, 20 x 32 pixels)" in told(context, "enlarged")


def test_large_enough_photos_are_not_told(photos: Path, run: RunFolder) -> None:
    context = context_of(photos, holdout=0)
    read_images(context, run)
    assert not [warning for warning in context.warnings if "enlarged" in warning]


def test_a_pixel_too_few_and_one_pixel_only(photos: Path, run: RunFolder) -> None:
    draw(photos, {"z.png": (64, 63)}, seed=1)
    context = context_of(photos, holdout=0)
    read_images(context, run)
    assert "1 of 4 images" in told(context, "enlarged") and "at most 1.02 times (z.png" in told(context, "enlarged")
    draw(photos, {"z.png": (1, 1), "y.png": (3000, 2)}, seed=1)
    context = context_of(photos, holdout=0)
    read_images(context, run)
    assert "at most 64 times (z.png, 1 x 1 pixels)" in told(context, "enlarged")


def test_with_buckets_the_size_of_the_bucket_counts(photos: Path, run: RunFolder) -> None:
    """A photo of 128 x 32 goes to 128 x 32; one of 48 x 96 to 40 x 96, as a square it would have to grow."""
    draw(photos, {"wide.png": (128, 32), "tall.png": (48, 96)}, seed=1)
    context = context_of(photos, holdout=0, buckets=True, bucket_step=8)
    read_images(context, run)
    assert not [warning for warning in context.warnings if "enlarged" in warning]
    context = context_of(photos, holdout=0)
    read_images(context, run)
    assert "2 of 5 images" in told(context, "enlarged")


def test_held_out_photos_count_as_the_squares_that_they_are_measured_as(photos: Path, run: RunFolder) -> None:
    draw(photos, {f"{number}.png": (128, 32) for number in range(3)}, seed=1)
    context = context_of(photos, holdout=2, buckets=True, bucket_step=8)
    read_images(context, run)
    assert "2 of 3 images" in told(context, "enlarged") and "2 times" in told(context, "enlarged")


def test_colour_profiles_that_cannot_be_used(photos: Path, run: RunFolder) -> None:
    draw(photos, {"x.png": (64, 64), "y.png": (64, 64)}, seed=1, icc_profile=b"nonsense")
    for _ in range(2):  # the second time the index of files knows
        context = context_of(photos, holdout=0)
        read_images(context, run)
        assert "2 of 5 images have a colour profile" in told(context, "profile") and "x.png" in told(context, "profile")


# --- class images ---


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many class images were asked for; they are drawn without a model."""
    counts: list[int] = []

    def make(folder: Path, plan: Any, make_pipeline: Any, model_id: str, rank: int, world: int) -> int:
        missing = prior.find_class_images(folder, plan, model_id).missing
        mark = prior.fingerprint(plan, model_id)
        draw(folder, {f"{item.image_index:05d}-{mark}.png": (64, 64) for item in missing}, seed=2)
        counts.append(len(missing))
        return len(missing)

    monkeypatch.setattr(images.prior, "make_class_images", make)
    return counts


def classes_of(context: RunContext, run: RunFolder) -> list[str]:
    pictures = with_class_images(context, run, read_images(context, run))
    assert not [record for record in pictures.classes if record.known is None]
    return [record.name for record in pictures.classes]


def prior_context(photos: Path, classes: Path | None, count: int = 2) -> RunContext:
    options = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": count, "holdout": 0}
    return context_of(photos, class_data_dir=classes, **options)


def test_own_class_images_all_count(
    photos: Path, run: RunFolder, made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    classes = draw(photos.parent / "classes", {"a.jpg": (64, 64), "b.png": (30, 64), "c.png": (64, 64)})
    context = prior_context(photos, classes)
    assert classes_of(context, run) == ["a.jpg", "b.png", "c.png"] and made == [0]
    assert f"class images in {classes}: 3 of your own" in caplog.messages
    assert "1 of 3 class images are smaller" in told(context, "enlarged")


def test_a_new_folder_and_what_is_made_in_it_are_told(
    photos: Path, run: RunFolder, made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A typo in the name of a folder would otherwise show in an hour."""
    caplog.set_level("INFO")
    context = prior_context(photos, photos.parent / "typo")
    assert len(classes_of(context, run)) == 2 and made == [2]
    assert f"class images in {photos.parent / 'typo'} (a new folder): 2 made now" in caplog.messages
    caplog.clear()
    context = prior_context(photos, photos.parent / "typo", count=1)
    assert len(classes_of(context, run)) == 1
    assert "1 made before, 1 made before that are more than --num_class_images asks for" in caplog.text


def test_broken_class_images_are_told_before_any_is_made(photos: Path, run: RunFolder, made: list[int]) -> None:
    classes = draw(photos.parent / "classes", {f"{number}.png": (64, 64) for number in range(3)})
    for name in ("0.png", "2.png"):
        whole = (classes / name).read_bytes()
        (classes / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"(?s)^2 of 3 images cannot be read.*0\.png.*2\.png"):
        classes_of(prior_context(photos, classes, count=9), run)
    assert made == []


@pytest.mark.parametrize("holdout", [0, 2])
def test_photos_among_the_class_images(photos: Path, run: RunFolder, made: list[int], holdout: int) -> None:
    classes = draw(photos.parent / "classes", {"a.png": (64, 64)})
    for name in ("1.png", "2.png"):
        (classes / f"copy-of-{name}").write_bytes((photos / name).read_bytes())
    context = prior_context(photos, classes, count=9)
    context.config = replace(context.config, data=replace(context.config.data, holdout=holdout))
    with pytest.raises(UserError, match=r"2 of 3 class images are images to learn as well, such as .*copy-of-1\.png"):
        classes_of(context, run)
    assert made == []


def test_files_beside_class_images_are_named(photos: Path, run: RunFolder, made: list[int]) -> None:
    classes = draw(photos.parent / "classes", {"a.png": (64, 64)})
    (classes / "notes.pdf").write_bytes(b"")
    context = prior_context(photos, classes, count=1)
    classes_of(context, run)
    assert "notes.pdf" in told(context, "not used")


def test_without_prior_preservation_nothing_is_looked_at(photos: Path, run: RunFolder) -> None:
    pictures = RunImages([], [], [], ())
    assert with_class_images(context_of(photos), run, pictures) is pictures


def test_class_images_have_the_familys_negative_prompt_and_not_the_samples(photos: Path) -> None:
    """They are for other runs too; but some models are not guided at all without one."""
    context = context_of(photos)
    config = replace(context.config, sample=replace(context.config.sample, negative_prompt="a cat"))
    found = [
        class_plan(replace(context, config=config, family=family), "a dog").negative_prompt
        for family in (sd, qwen_image)
    ]
    assert found == [None, " "]
