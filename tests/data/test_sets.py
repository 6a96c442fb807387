"""Several data sets in one run, and masks."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamlora.config import Data, DataSet
from dreamlora.data.cache import TensorCache
from dreamlora.data.dataset import split_holdout
from dreamlora.data.encode import Filling, encode_dataset
from dreamlora.data.sets import epoch_length, load_sets, loss_shares, places
from dreamlora.data.transforms import Preparations, bucket_numbers
from dreamlora.errors import UserError
from dreamlora.interfaces import Latents


def pictures(folder: Path, count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (count, size[1], size[0], 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


def half_white(file: Path, size: tuple[int, int] = (32, 32)) -> None:
    """White on the left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(file)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Three dogs, seen three times each, and two parks."""
    return Data(
        datasets=(
            DataSet(instance_data_dir=pictures(tmp_path / "dogs", 3), instance_prompt="a sks dog", repeats=3),
            DataSet(
                instance_data_dir=pictures(tmp_path / "parks", 2, (48, 32), 1),
                instance_prompt="a park",
                resolution=16,
                loss_weight=0.25,
            ),
        ),
        resolution=32,
        latents_cache_dir=tmp_path / "cache",
    )


def encoded(data: Data, cache: Path):
    how = Preparations.of(data, 32, 0)
    records = load_sets(data).records

    def encode(pixels: torch.Tensor) -> Latents:
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return Latents(mean, torch.zeros_like(mean))

    return records, how, encode_dataset(records, how, encode, Filling(TensorCache(cache), {}, progress=False))


def test_the_images_stand_in_a_row_with_their_captions_and_the_name_of_their_set(data: Data) -> None:
    records = load_sets(data).records
    assert [(record.name, record.caption, record.dataset) for record in records] == [
        *((f"dogs/{i}.png", "a sks dog", 0) for i in range(3)),
        *((f"parks/{i}.png", "a park", 1) for i in range(2)),
    ]
    assert [record.name for record in records[2:4]] == ["dogs/2.png", "parks/0.png"] and records[-1].open()
    assert data.subject_prompt == "a sks dog"


def test_two_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    sets = tuple(DataSet(instance_data_dir=pictures(tmp_path / side / "dog", 1)) for side in "ab")
    data = Data(datasets=sets, instance_prompt="a dog", latents_cache_dir=tmp_path / "cache")
    assert [record.name for record in load_sets(data).records] == ["dog-1/0.png", "dog-2/0.png"]


def test_repeats_are_how_often_an_image_has_a_place_in_an_epoch(data: Data) -> None:
    records = load_sets(data).records
    assert Counter(places(records, data) or ()) == {0: 3, 1: 3, 2: 3, 3: 1, 4: 1}
    assert epoch_length(records, data) == 11
    training, _ = split_holdout(records, 1)
    assert len(places(training, data) or ()) == epoch_length(training, data) in (8, 10)


def test_what_all_repeats_have_in_common_changes_the_length_of_an_epoch_alone(tmp_path: Path) -> None:
    folders = [pictures(tmp_path / name, 2) for name in "ab"]
    data = Data(
        datasets=tuple(DataSet(instance_data_dir=folder, repeats=n) for folder, n in zip(folders, (4, 6), strict=True)),
        instance_prompt="p",
        latents_cache_dir=tmp_path / "cache",
    )
    records = load_sets(data).records
    assert Counter(places(records, data) or ()) == {0: 2, 1: 2, 2: 3, 3: 3} and epoch_length(records, data) == 20
    alike = Data(instance_data_dir=folders[0], instance_prompt="p", repeats=7, latents_cache_dir=tmp_path / "cache")
    assert places(load_sets(alike).records, alike) is None and epoch_length(load_sets(alike).records, alike) == 14


def test_weights_and_sizes_are_those_of_the_set(data: Data, tmp_path: Path) -> None:
    records, how, store = encoded(data, tmp_path / "cache")
    assert loss_shares(records, data) == pytest.approx([1, 1, 1, 0.25, 0.25])
    shapes = [tuple(store.latents(index, 0)[0].shape) for index in range(5)]
    assert shapes == [(3, 4, 4)] * 3 + [(3, 2, 2)] * 2
    numbers = list(bucket_numbers(records, how) or ())
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3] == numbers[4]
    fixed = how.fixed(32)
    assert {fixed[record].target(record.facts.size) for record in records} == {(32, 32)}


def test_a_mask_says_how_much_of_the_loss_every_place_has(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "dogs", 2)
    half_white(tmp_path / "masks" / "1.jpg")
    data = Data(
        instance_data_dir=folder,
        mask_data_dir=tmp_path / "masks",
        instance_prompt="p",
        latents_cache_dir=tmp_path / "cache",
        random_flip=True,
    )
    assert [note for note in load_sets(data).notes if "which are learned everywhere: 1 of 2" in note]
    _, _, store = encoded(data, tmp_path / "cache")
    assert store.mask(0, 0) is None
    mask, mirrored = (store.mask(1, variant) for variant in (0, 1))
    assert mask is not None and mirrored is not None and mask.shape == (1, 4, 4)
    assert torch.allclose(mask, torch.tensor([1.0, 1, 0, 0]).expand(1, 4, 4), atol=0.02)  # JPEG is not exact
    assert torch.equal(mirrored, mask.flip(-1))
    both = store.masks()
    assert both is not None and torch.equal(both[0], torch.ones(1, 4, 4)) and torch.equal(both[1], mask)


def test_a_mask_is_cropped_as_its_image_is(tmp_path: Path) -> None:
    """The photo is white where its mask is, so that the two must look alike in every crop."""
    (tmp_path / "dogs").mkdir()
    half_white(tmp_path / "masks" / "a.png", (96, 40))
    Image.open(tmp_path / "masks" / "a.png").convert("RGB").save(tmp_path / "dogs" / "a.png")
    data = Data(
        instance_data_dir=tmp_path / "dogs",
        mask_data_dir=tmp_path / "masks",
        instance_prompt="p",
        latents_cache_dir=tmp_path / "cache",
    )
    _, _, store = encoded(data, tmp_path / "cache")
    assert store.count(0) == 4
    for variant in range(4):
        mask = store.mask(0, variant)
        assert mask is not None
        assert torch.allclose(store.latents(0, variant)[0].mean(0) / 2 + 0.5, mask[0], atol=0.01)


def another_shape(folder: Path) -> None:
    half_white(folder / "0.png", (32, 20))


def of_no_image(folder: Path) -> None:
    half_white(folder / "dog.png")


def two_of_one(folder: Path) -> None:
    half_white(folder / "0.png")
    half_white(folder / "0.jpg")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (another_shape, r"0.png has another shape \(32 x 20\) than its image .*0.png \(32 x 32\)"),
        (of_no_image, "1 mask in .* belongs to no image, such as dog.png"),
        (two_of_one, "0.jpg and 0.png in .* are masks of one image"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(spoil, message: str, tmp_path: Path) -> None:
    spoil(tmp_path / "masks")
    data = Data(
        instance_data_dir=pictures(tmp_path / "dogs", 1),
        mask_data_dir=tmp_path / "masks",
        instance_prompt="p",
        latents_cache_dir=tmp_path / "cache",
    )
    with pytest.raises(UserError, match=message):
        load_sets(data)


def test_a_black_mask_is_refused(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "0.png")
    data = Data(
        instance_data_dir=pictures(tmp_path / "dogs", 1),
        mask_data_dir=tmp_path / "masks",
        instance_prompt="p",
        latents_cache_dir=tmp_path / "cache",
    )
    with pytest.raises(UserError, match=r"0.png is black everywhere"):
        load_sets(data)


def masked(tmp_path: Path, **options) -> Data:
    folders = {"instance_data_dir": tmp_path / "dogs", "mask_data_dir": tmp_path / "masks"}
    return Data(**folders, instance_prompt="p", latents_cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize("name", ["0.jpg", "0.png.png", "DÉJÀ VU.webp", unicodedata.normalize("NFD", "Déjà vu.png")])
def test_a_mask_is_named_like_its_image_as_captions_are(name: str, tmp_path: Path) -> None:
    pictures(tmp_path / "dogs", 2)
    (tmp_path / "dogs" / "1.png").rename(tmp_path / "dogs" / "Déjà vu.png")
    half_white(tmp_path / "masks" / name)
    marked = [record.name for record in load_sets(masked(tmp_path)).records if record.mask]
    assert marked == ["0.png" if name.startswith("0") else "Déjà vu.png"]


def test_a_mask_that_could_belong_to_several_images_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "dogs", 2)
    for number, name in enumerate(("DOG.png", "Dog.png")):
        (tmp_path / "dogs" / f"{number}.png").rename(tmp_path / "dogs" / name)
    if len(list((tmp_path / "dogs").iterdir())) < 2:
        pytest.skip("a file system where case does not count")
    half_white(tmp_path / "masks" / "dog.png")
    with pytest.raises(UserError, match=r"masks.dog.png differs in case from DOG.png and Dog.png"):
        load_sets(masked(tmp_path))


def test_images_that_are_not_used_may_have_masks(tmp_path: Path) -> None:
    pictures(tmp_path / "dogs", 3)
    for number in range(3):
        half_white(tmp_path / "masks" / f"{number}.png")
    (tmp_path / "masks" / "2.png").write_text("no image, but not looked at either")
    records, notes, _ = load_sets(masked(tmp_path, max_train_samples=2))
    assert [bool(record.mask) for record in records] == [True, True] and not notes


def test_masks_of_images_in_sub_folders_lie_in_such_ones(tmp_path: Path) -> None:
    for place in ("", "more", "others"):
        pictures(tmp_path / "dogs" / place, 1)
        half_white(tmp_path / "masks" / place / "0.png")
    rows = '{"file_name": "0.png", "text": "a"}\n{"file_name": "more/0.png", "text": "b"}\n'
    (tmp_path / "dogs" / "metadata.jsonl").write_text(rows, encoding="utf-8")
    records, notes, _ = load_sets(masked(tmp_path))
    assert [(record.name, record.mask.name) for record in records if record.mask] == [
        ("0.png", "0.png"),
        ("more/0.png", "more/0.png"),
    ]
    assert any("masks has 1 entry that is not used: others" in note for note in notes)


def test_masks_lie_in_their_folder_and_are_files(tmp_path: Path) -> None:
    pictures(tmp_path / "dogs" / "more", 1)
    (tmp_path / "dogs" / "metadata.csv").write_text("file_name\nmore/0.png\n", encoding="utf-8")
    half_white(tmp_path / "private" / "0.png")
    half_white(tmp_path / "masks" / "0.png")
    (tmp_path / "masks" / "more").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"more leads out of .*masks through a link"):
        load_sets(masked(tmp_path))
    (tmp_path / "masks" / "more").unlink()
    (tmp_path / "masks" / "0.png").unlink()
    os.mkfifo(tmp_path / "masks" / "0.png")
    with pytest.raises(UserError, match=r"0\.png is a pipe, not a file"):
        load_sets(masked(tmp_path))


def test_every_file_among_the_masks_is_used_or_named(tmp_path: Path) -> None:
    pictures(tmp_path / "dogs", 1)
    half_white(tmp_path / "masks" / "0.png")
    for name in ("0.txt", "metadata.csv", "plan.xcf.bak"):
        (tmp_path / "masks" / name).write_text("file_name,text\n", encoding="utf-8")
    (note,) = load_sets(masked(tmp_path)).notes
    assert "masks has 3 entries that are not used: 0.txt, metadata.csv (captions beside masks do not count)" in note
    assert "plan.xcf.bak" in note


def cut_out(opaque: int) -> Image.Image:
    picture = Image.new("RGBA", (32, 32), (200, 50, 50, 255))
    picture.putalpha(Image.new("L", (32, 32), opaque))
    return picture


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_mask_that_is_transparent_in_places_is_refused(mode: str, tmp_path: Path) -> None:
    """On white, as photos are put, what was cut away would be learned, too."""
    pictures(tmp_path / "dogs", 1)
    (tmp_path / "masks").mkdir()
    cut_out(0).convert(mode).save(tmp_path / "masks" / "0.png")
    with pytest.raises(UserError, match=r"0.png is transparent in places"):
        load_sets(masked(tmp_path))
    cut_out(255).convert(mode).save(tmp_path / "masks" / "0.png")
    assert load_sets(masked(tmp_path)).records[0].mask


def test_masks_among_the_photos_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "dogs", 1)
    data = Data(instance_data_dir=folder, mask_data_dir=tmp_path / "dogs" / ".", instance_prompt="p")
    with pytest.raises(UserError, match="is the folder of the images"):
        load_sets(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_data_dir": Path("a")}, "give either --instance_data_dir or datasets"),
        ({"dataset_name": "a"}, "give either --dataset_name or datasets"),
        ({"max_train_samples": 3}, "give either --max_train_samples or datasets"),
        ({"mask_data_dir": Path("a")}, "give either --mask_data_dir or datasets"),
        ({"streaming": True}, "--streaming is only used together with --dataset_name"),
    ],
)
def test_what_belongs_into_an_entry(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Data(datasets=(DataSet(instance_data_dir=Path("b")),), **options)


def test_every_line_is_a_caption_where_there_are_files() -> None:
    sets = (DataSet(instance_data_dir=Path("a")), DataSet(dataset_name="b"))
    assert [one.captions_per_line for one in Data(datasets=sets, captions_per_line=True).each()] == [True, False]
    with pytest.raises(UserError, match="--captions_per_line is about text files beside images"):
        Data(datasets=sets[1:], captions_per_line=True)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_data_set_has_a_weight(weight: float) -> None:
    with pytest.raises(UserError, match=r"--loss_weight must be above 0"):
        DataSet(dataset_name="a", loss_weight=weight)


def test_images_in_more_than_one_data_set_are_told(tmp_path: Path) -> None:
    dogs, parks = (pictures(tmp_path / name, 3) for name in ("dogs", "parks"))
    (parks / "2.png").unlink()
    sets = tuple(DataSet(instance_data_dir=folder, instance_prompt="p") for folder in (dogs, parks))
    data = Data(datasets=sets, latents_cache_dir=tmp_path / "cache")
    assert "2 of 3 different images are in more than one data set" in load_sets(data).notes
    pictures(parks, 2, seed=1)
    assert not load_sets(data).notes


def test_an_entry_takes_from_the_flags_what_it_does_not_say() -> None:
    data = Data(
        datasets=(DataSet(dataset_name="a"), DataSet(instance_data_dir=Path("b"), repeats=2, caption_column="x")),
        repeats=5,
        caption_column="text",
        streaming=True,
        instance_prompt="p",
    )
    first, second = data.each()
    assert (first.dataset_name, first.repeats, first.caption_column, first.streaming) == ("a", 5, "text", True)
    assert (second.instance_data_dir, second.repeats, second.caption_column) == (Path("b"), 2, "x")
    assert not second.streaming and first.instance_prompt == second.instance_prompt == "p"


def test_one_photo_in_sets_of_several_sizes_is_encoded_at_each(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "dogs", 2)
    sets = tuple(DataSet(instance_data_dir=folder, instance_prompt="p", resolution=side) for side in (32, 16, 32))
    records, _, store = encoded(Data(datasets=sets, latents_cache_dir=tmp_path / "cache"), tmp_path / "cache")
    assert [store.latents(index, 0)[0].shape[-1] for index in range(len(records))] == [4, 4, 2, 2, 4, 4]
