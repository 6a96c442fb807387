"""The transparency of images as their masks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamlora.config import Data, DataSet
from dreamlora.data.cache import TensorCache
from dreamlora.data.encode import Filling, encode_dataset
from dreamlora.data.images import alpha
from dreamlora.data.mask_files import grey
from dreamlora.data.rgb import Opacity
from dreamlora.data.sets import load_sets
from dreamlora.data.stores import LatentStore
from dreamlora.data.transforms import Preparations
from dreamlora.errors import UserError
from dreamlora.interfaces import Latents
from dreamlora.run.image_list import fingerprint

SIZE = (32, 24)
TURNED = 6
"""Of EXIF: the right of the file is the bottom of the picture."""


def channel(left: int = 255, right: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """An alpha channel whose halves have these values."""
    picture = Image.new("L", size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


def cut_out(file: Path, of: Image.Image | None = None, **options: Any) -> None:
    """Noise, of which the right half is transparent."""
    of = of or channel()
    pixels = np.random.default_rng(len(file.name)).integers(0, 255, (of.height, of.width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.putalpha(of)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, **options)


def opaque(file: Path, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def options(tmp_path: Path, **more: Any) -> Data:
    own = {"instance_data_dir": tmp_path / "dogs", "alpha_mask": True} | more
    return Data(instance_prompt="p", latents_cache_dir=tmp_path / "cache", **own)


def stored(data: Data, tmp_path: Path) -> LatentStore:
    def encode(pixels: torch.Tensor) -> Latents:
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return Latents(mean, torch.zeros_like(mean))

    filling = Filling(TensorCache(tmp_path / "cache"), {}, progress=False)
    return encode_dataset(load_sets(data).records, Preparations.of(data, 32, 0), encode, filling)


def test_what_is_opaque_is_learned(tmp_path: Path) -> None:
    cut_out(tmp_path / "dogs" / "a.png")
    opaque(tmp_path / "dogs" / "b.png")
    records, notes, _ = load_sets(options(tmp_path))
    assert [record.mask is not None for record in records] == [True, False]
    assert "images without transparency, which are learned everywhere: 1 of 2" in notes
    mask = records[0].mask
    assert mask and np.array_equal(np.asarray(grey(mask)), np.asarray(channel()))
    assert mask.facts.size == SIZE and mask.content_hash() != records[0].content_hash()


def test_only_if_it_is_asked_for(tmp_path: Path) -> None:
    cut_out(tmp_path / "dogs" / "a.png")
    records, notes, _ = load_sets(options(tmp_path, alpha_mask=False))
    assert records[0].mask is None and not notes
    with_masks = load_sets(options(tmp_path)).records
    assert fingerprint(with_masks) != fingerprint(records), "a run with masks is not gone on with without"


def test_it_is_cropped_and_mirrored_as_the_image_is(tmp_path: Path) -> None:
    """The picture is white where it is opaque, so that the two must look alike in every crop."""
    white = Image.new("RGB", (96, 40), "black")
    white.paste("white", (0, 0, 48, 40))
    white.putalpha(channel(size=(96, 40)).point(lambda value: max(value, 1)))  # nearly transparent black stays black
    (tmp_path / "dogs").mkdir()
    white.save(tmp_path / "dogs" / "a.png")
    store = stored(options(tmp_path, resolution=32, random_flip=True, crop_variants=3), tmp_path)
    for variant in range(6):
        mask = store.mask(0, variant)
        assert mask is not None
        left, right = store.latents(0, variant)[0].mean(0) / 2 + 0.5, mask[0]
        opaque_places = right > 0.99
        assert torch.allclose(left[opaque_places], right[opaque_places], atol=0.02)
    assert {round(float(m.mean()), 2) for v in range(6) if (m := store.mask(0, v)) is not None} != {1.0}


@pytest.mark.parametrize(
    ("name", "saved"),
    [("a.png", {}), ("a.webp", {"lossless": True}), ("a.tiff", {}), ("a.gif", {})],
)
def test_formats_with_transparency(name: str, saved: dict[str, Any], tmp_path: Path) -> None:
    cut_out(tmp_path / "dogs" / name, **saved)
    record = load_sets(options(tmp_path)).records[0]
    assert record.mask is not None
    found = np.asarray(grey(record.mask))
    assert np.array_equal(found, np.asarray(channel()))


def test_turned_photos_have_turned_masks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = TURNED
    cut_out(tmp_path / "dogs" / "a.png", exif=exif)
    record = load_sets(options(tmp_path)).records[0]
    assert record.mask is not None and record.facts.size == SIZE[::-1] == record.mask.facts.size
    expected = np.asarray(channel().transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.asarray(grey(record.mask)), expected)


def test_half_transparent_places_are_learned_by_half(tmp_path: Path) -> None:
    cut_out(tmp_path / "dogs" / "a.png", channel(255, 128, (32, 32)))
    store = stored(options(tmp_path, resolution=32, center_crop=True), tmp_path)
    mask = store.mask(0, 0)
    assert mask is not None
    assert torch.allclose(mask, torch.tensor([1.0, 1, 0.5, 0.5]).expand(1, 4, 4), atol=0.01)


@pytest.mark.parametrize(
    ("left", "right", "opacity"),
    [(255, 255, Opacity.ALL), (255, 254, Opacity.PARTLY), (1, 0, Opacity.PARTLY), (0, 0, Opacity.NOTHING)],
)
def test_how_much_is_opaque_is_known_from_the_first_look_and_remembered(
    left: int, right: int, opacity: Opacity, tmp_path: Path
) -> None:
    cut_out(tmp_path / "dogs" / "a.png", channel(left, right))
    data = options(tmp_path, alpha_mask=False)
    assert load_sets(data).records[0].facts.opacity is opacity
    if opacity is not Opacity.NOTHING:
        masked = load_sets(options(tmp_path)).records[0].mask is not None
        assert masked == (opacity is Opacity.PARTLY)


def test_an_image_of_which_nothing_is_opaque_is_refused(tmp_path: Path) -> None:
    cut_out(tmp_path / "dogs" / "a.png", channel(0, 0))
    with pytest.raises(UserError, match=r"a.png is transparent everywhere: with --alpha_mask nothing of it"):
        load_sets(options(tmp_path))


def test_a_mask_of_the_folder_goes_first(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        cut_out(tmp_path / "dogs" / name)
    opaque(tmp_path / "dogs" / "c.png")
    (tmp_path / "masks").mkdir()
    channel(0, 255).save(tmp_path / "masks" / "a.png")
    records, notes, _ = load_sets(options(tmp_path, mask_data_dir=tmp_path / "masks"))
    found = [None if record.mask is None else np.asarray(grey(record.mask))[0, [0, -1]].tolist() for record in records]
    assert found == [[0, 255], [255, 0], None]
    told = f"images without a mask in {tmp_path / 'masks'} or transparency, which are learned everywhere: 1 of 3"
    assert told in notes


def test_a_transparent_image_with_a_mask_may_be_empty(tmp_path: Path) -> None:
    cut_out(tmp_path / "dogs" / "a.png", channel(0, 0))
    (tmp_path / "masks").mkdir()
    channel().save(tmp_path / "masks" / "a.png")
    assert load_sets(options(tmp_path, mask_data_dir=tmp_path / "masks")).records[0].mask


def test_each_data_set_has_its_own_say(tmp_path: Path) -> None:
    for name in ("dogs", "cats"):
        cut_out(tmp_path / name / "a.png")
    sets = [DataSet(instance_data_dir=tmp_path / name) for name in ("dogs", "cats")]

    def masked(flag: bool, *alpha_masks: bool | None) -> list[bool]:
        entries = tuple(
            DataSet(instance_data_dir=one.instance_data_dir, alpha_mask=own)
            for one, own in zip(sets, alpha_masks, strict=True)
        )
        data = options(tmp_path, instance_data_dir=None, datasets=entries, alpha_mask=flag)
        return [record.mask is not None for record in load_sets(data).records]

    assert masked(True, None, None) == [True, True]
    assert masked(True, None, False) == [True, False]
    assert masked(False, True, None) == [True, False]


def test_the_alpha_of_an_opaque_image_is_white() -> None:
    for mode in ("RGB", "L", "I;16", "CMYK"):
        content = io.BytesIO()
        Image.new(mode, (3, 2)).save(content, "TIFF")
        assert np.asarray(alpha(content.getvalue(), "x")).tolist() == [[255] * 3] * 2
