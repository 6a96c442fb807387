"""Pixels are those of transformers' own processors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image
from transformers import AutoImageProcessor

from dreamlora.errors import UserError
from dreamlora.evaluation.preprocessing import DINO, as_image, read_preprocessing
from tests.fuzzing import as_json, changed, fuzzed, harmless


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_pixels_are_those_of_transformers(
    name: str, encoder_folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    folder = encoder_folders[name]
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    ours = read_preprocessing(folder / "preprocessor_config.json", keeps_proportions=True)
    for picture in pictures:
        expected = theirs(picture, return_tensors="pt").pixel_values
        torch.testing.assert_close(ours([picture]), expected, atol=1e-5, rtol=0)


def test_dino_keeps_the_proportions(pictures: list[Image.Image]) -> None:
    wide = pictures[1]
    pixels = DINO([wide])[0]
    resized = wide.resize((int(256 * wide.width / wide.height), 256), Image.Resampling.BICUBIC)
    left = (resized.width - 224) // 2
    cut = np.asarray(resized)[16:240, left : left + 224] / 255
    expected = (cut - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize(("keeps", "resize"), [(True, 224), (False, (224, 224))])
def test_an_old_size_is_one_number(keeps: bool, resize: object, tmp_path: Path) -> None:
    old = {"size": 224, "crop_size": 224, "do_center_crop": keeps, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "a.json").write_text(json.dumps(old), encoding="utf-8")
    assert read_preprocessing(tmp_path / "a.json", keeps).resize == resize


@pytest.mark.parametrize(
    "more",
    [
        {"size": {"longest_edge": 5}},
        {"do_resize": False},
        {"crop_size": 40, "do_center_crop": True},
        {"crop_size": {"height": 3, "width": 5}, "do_center_crop": True},
        {"image_mean": [0.5]},
    ],
    ids=["longest edge", "no resize", "crop beyond", "crop no square", "grey"],
)
def test_what_would_be_done_otherwise_is_refused(more: dict[str, object], tmp_path: Path) -> None:
    good = {"size": {"shortest_edge": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "a.json").write_text(json.dumps(good | more), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json: (this way to prepare images is not supported|image_mean: )"):
        read_preprocessing(tmp_path / "a.json", True)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        torch.zeros(4, 4, 3),
        np.zeros((3, 4, 4), dtype=np.uint8),
        np.zeros((4, 4), dtype=np.uint8),
    ],
    ids=["float array", "tensor", "channels first", "grey"],
)
def test_floats_and_other_shapes_are_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="expected PIL images or uint8 HWC arrays"):
        as_image(wrong)  # type: ignore[arg-type]


def test_arrays_are_images(pictures: list[Image.Image]) -> None:
    assert torch.equal(DINO([np.asarray(pictures[0])]), DINO([pictures[0]]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 10**9},
        {"size": {"height": 24, "width": 0}},
        {"size": "24"},
        {"crop_size": 10**6, "do_center_crop": True},
        {"resample": 9},
        {"rescale_factor": float("nan"), "image_std": [0.0] * 3},
        {"image_mean": ["a"] * 3},
        {"image_processor": []},
    ],
    ids=str,
)
def test_what_no_processor_says_is_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    good = {"size": {"shortest_edge": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "a.json").write_text(json.dumps(good | wrong), encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot read .*a\.json: "):
        read_preprocessing(tmp_path / "a.json", True)


PROCESSOR = {
    "crop_size": {"height": 24, "width": 24},
    "do_center_crop": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.004,
    "size": {"shortest_edge": 24},
}


@fuzzed
@given(changed({"image_processor": PROCESSOR} | PROCESSOR))
def test_fuzz_preprocessor_config(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    file = tmp_path_factory.getbasetemp() / "preprocessor_config.json"
    file.write_bytes(as_json(content))
    found = harmless(lambda: read_preprocessing(file, True))
    if not isinstance(found, UserError):
        assert found([np.zeros((30, 40, 3), dtype=np.uint8)]).isfinite().all()
