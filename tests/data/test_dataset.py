"""Folders, captions, Hugging Face data sets and the hold-out."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dreamlora.config import Data
from dreamlora.data import dataset, file_index
from dreamlora.data.dataset import examine, load_images, split_holdout
from dreamlora.data.entries import natural_key
from dreamlora.data.folder import load_folder
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError


def save(folder: Path, *names: str) -> None:
    """Small images, all different."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, len(list(folder.iterdir())), 0)).save(file)


def captions(folder: Path, prompt: str | None = None, column: str | None = None) -> dict[str, str]:
    return {record.name: record.caption for record in load_folder(folder, prompt, column).records}


def test_natural_order_and_skipped_files(tmp_path):
    save(tmp_path, "img10.png", "img2.PNG", "IMG1.jpg", "z.jpeg", ".hidden.png", "deeper/x.png")
    for name in ("img2.txt", "img10.caption", ".DS_Store", "notes.pdf", "movie.mov"):
        (tmp_path / name).write_text("", encoding="utf-8")
    images = load_folder(tmp_path, "p")
    assert [record.name for record in images.records] == ["IMG1.jpg", "img2.PNG", "img10.png", "z.jpeg"]
    assert images.notes[-1].endswith(
        "has 5 entries that are not used: deeper (a folder, whose images (1) are not used: give it as a data set of "
        "its own); img2.txt, img10.caption (an empty caption file); movie.mov, notes.pdf (no image, caption "
        "or metadata)"
    )


def test_precedence_of_captions(tmp_path):
    save(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    rows = [{"file_name": f"{name}.png", "text": f"{name} row"} for name in "bc"] + [{"file_name": "d.png", "text": ""}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeffa,\n file \n", encoding="utf-8")
    (tmp_path / "a.caption").write_text("a, file", encoding="utf-8")
    (tmp_path / "b.txt").write_text("  \n", encoding="utf-8")
    (tmp_path / "c.TXT").write_text("c  row", encoding="utf-8")
    assert captions(tmp_path, " for  all ") == {
        "a.png": "a, file",
        "b.png": "b row",
        "c.png": "c row",
        "d.png": "for all",
        "e.png": "for all",
    }
    with pytest.raises(UserError, match=r"d\.png has no caption.*2 of 5.*--instance_prompt"):
        load_folder(tmp_path)


def test_csv_and_caption_column(tmp_path):
    save(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name,caption,long\na.png,"x, y",l1\nsub/b.png,z,l2\n', encoding="utf-8"
    )
    assert captions(tmp_path) == {"a.png": "x, y", "sub/b.png": "z"}
    assert captions(tmp_path, column="long") == {"a.png": "l1", "sub/b.png": "l2"}
    with pytest.raises(UserError, match=r"no column 'short'.*file_name, caption, long"):
        captions(tmp_path, column="short")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"file_name": "gone.png", "text": "x"}', r"metadata\.jsonl, line 1: there is no file .*gone\.png"),
        ('{"text": "x"}', "line 1: no file_name"),
        ('\n{"file_name"', "line 2: not JSON"),
        ("[1]", "line 1: expected"),
        ('{"file_name": "a.png", "text": "x"}\n' * 2, "line 2: a.png was named before"),
    ],
)
def test_bad_metadata(tmp_path, text, message):
    save(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_folder(tmp_path, "p")


def test_two_metadata_files(tmp_path):
    save(tmp_path, "a.png")
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="keep one"):
        load_folder(tmp_path, "p")


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"--class_data_dir .*gone: there is no such folder"):
        load_folder(tmp_path / "gone", "p", flag="--class_data_dir")
    with pytest.raises(UserError, match="holds no images"):
        load_folder(tmp_path, "p")
    save(tmp_path, "deep/er/a.png")
    with pytest.raises(UserError, match=r"only in sub-folders.*give .*deep/er$"):
        load_folder(tmp_path, "p")
    with pytest.raises(UserError, match="is a file"):
        load_folder(tmp_path / "deep/er/a.png", "p")


def test_bad_caption_and_format(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        load_folder(tmp_path, "p")
    (tmp_path / "b.jxl").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read b\.jxl \(1 such file\): convert"):
        load_folder(tmp_path, "p")


def test_load_images(tmp_path):
    save(tmp_path, "a.png", "b.png", "c.png")
    data = Data(instance_data_dir=tmp_path, instance_prompt="p", max_train_samples=2)
    assert [record.name for record in load_images(data).records] == ["a.png", "b.png"]
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b\.png: its content is no known image format"):
        load_images(data)
    with pytest.raises(UserError, match="nothing to train on"):
        load_images(Data())


def broken(folder: Path, *names: str) -> None:
    """Images whose header is whole: only what follows is missing."""
    for number, name in enumerate(names):
        pixels = Image.effect_noise((64, 64), 50 + number)
        pixels.save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])


def test_all_broken_images_are_told_at_once(tmp_path):
    save(tmp_path, "a.png", "b.png", "z.png")
    broken(tmp_path, "c.png", "d.jpg")
    (tmp_path / "e.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        load_images(Data(instance_data_dir=tmp_path, instance_prompt="p"))
    first, *lines, last = str(caught.value).splitlines()
    assert first == "3 of 6 images cannot be read:" and last.startswith("Repair them")
    assert [line.split(": ")[0].strip() for line in lines] == [
        str(tmp_path / name) for name in ("c.png", "d.jpg", "e.png")
    ]
    assert "truncated" in lines[1] and lines[2].endswith("no known image format")


def test_many_broken_images_are_counted_and_the_first_named(tmp_path):
    save(tmp_path, "a.png")
    broken(tmp_path, *(f"{number}.png" for number in range(25)))
    with pytest.raises(UserError, match=r"^25 of 26 images") as caught:
        load_images(Data(instance_data_dir=tmp_path, instance_prompt="p"))
    assert len(str(caught.value).splitlines()) == 13 and "and 15 more" in str(caught.value)
    assert "9.png" in str(caught.value) and "10.png" not in str(caught.value)


def test_too_many_pixels_and_a_vanished_file_are_broken_images(tmp_path, monkeypatch):
    save(tmp_path, "a.png", "b.png")
    records = load_folder(tmp_path, "p").records
    (tmp_path / "b.png").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"(?s)a\.png: it has too many pixels.*b\.png: No such file"):
        examine(records, None)


def test_broken_images_are_looked_at_again_and_sound_ones_not(tmp_path, monkeypatch):
    folder, data = tmp_path / "photos", Data(instance_data_dir=tmp_path / "photos", instance_prompt="p")
    data = replace(data, latents_cache_dir=tmp_path / "cache")
    save(folder, "a.png", "b.png")
    broken(folder, "c.png")
    later = time.time() + 60
    monkeypatch.setattr(file_index.time, "time", lambda: later)
    read = []
    monkeypatch.setattr(ImageRecord, "load", lambda record: read.append(record.name) or record.read())
    for expected in (["a.png", "b.png", "c.png"], ["c.png"]):
        read.clear()
        with pytest.raises(UserError, match=r"c\.png"):
            load_images(data)
        assert sorted(read) == expected
    monkeypatch.setattr(file_index.PIL, "__version__", "another")
    read.clear()
    with pytest.raises(UserError, match=r"c\.png"):
        load_images(data)
    assert sorted(read) == ["a.png", "b.png", "c.png"], "what one Pillow decodes another may not"


def test_threads_decode_and_few_images_are_in_memory(tmp_path, monkeypatch):
    save(tmp_path, *(f"{number}.png" for number in range(60)))
    monkeypatch.setattr(dataset.os, "cpu_count", lambda: 64)
    running, most, lock = [0], [0], threading.Lock()
    decoded = ImageRecord.decoded_facts

    def counted(record):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        with lock:
            running[0] -= 1
        return decoded(record)

    monkeypatch.setattr(ImageRecord, "decoded_facts", counted)
    records = load_folder(tmp_path, "p").records
    examine(records, None)
    assert 1 < most[0] <= dataset.MOST_THREADS
    assert [record.known for record in records] == [decoded(record) for record in records]


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    save(tmp_path / "photos", "a.png")
    monkeypatch.setenv("DREAMLORA_CACHE", str(tmp_path / "cache"))
    records = load_folder(tmp_path / "photos", "p").records
    examine(records, None)
    assert records[0].known is not None and not (tmp_path / "cache").exists()


def test_rows_that_are_not_asked_for_may_be_broken(tmp_path):
    save(tmp_path, "a.png", "c.png")
    broken(tmp_path, "b.png")
    records = load_folder(tmp_path, "p").records
    examine(records, None, rows=[0, 2])
    assert [record.known is not None for record in records] == [True, False, True]


def test_captioned_folder(tmp_path):
    save(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("ay", encoding="utf-8")
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,bee\n", encoding="utf-8")
    records = load_images(Data(train_data_dir=tmp_path)).records
    assert [(record.name, record.caption) for record in records] == [("a.png", "ay"), ("b.png", "bee")]


def test_known_files_are_not_read_again(tmp_path, monkeypatch):
    folder, data = tmp_path / "photos", Data(instance_data_dir=tmp_path / "photos", instance_prompt="p")
    data = replace(data, latents_cache_dir=tmp_path / "cache")
    save(folder, "a.png", "b.png")
    later = time.time() + 60
    monkeypatch.setattr(file_index.time, "time", lambda: later)
    before = [record.facts for record in load_images(data).records]
    read = []
    monkeypatch.setattr(ImageRecord, "load", lambda record: read.append(record.name) or record.read())
    assert [record.facts for record in load_images(data).records] == before and read == []
    time.sleep(0.02)
    Image.new("RGB", (9, 8), "red").save(folder / "b.png")
    assert load_images(data).records[1].facts.size == (9, 8) and read == ["b.png"]


def test_many_skipped_files_are_named_up_to_a_limit(tmp_path):
    save(tmp_path, "a.png")
    for number in range(120):
        (tmp_path / f"{number}.pdf").write_text("", encoding="utf-8")
    assert (
        "has 120 entries that are not used: 0.pdf, 1.pdf, 2.pdf and 117 more (" in load_folder(tmp_path, "p").notes[0]
    )


@pytest.mark.parametrize(
    "names",
    [
        ["2", "10", "a"],
        ["a2b", "a10b", "a10b1"],
        ["a", "a0", "a00", "a1", "ab"],
        ["IMG1", "img2", "Img03"],
        ["a b", "a.b"],
    ],
)
def test_natural_order_is_that_of_numbers(names):
    def plain(name):
        parts = re.split(r"(\d+)", name.casefold())
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name

    assert sorted(names, key=natural_key) == sorted(names, key=plain)


# --- Hugging Face datasets ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
    columns = {"image": images, "text": ["one", " two\n", ""], "title": [["t0", "u0"], ["t1"], ["t2"]], "n": [1, 2, 3]}
    folder = tmp_path_factory.mktemp("hub") / "saved"
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(folder))
    return folder


def test_dataset_columns(saved):
    def read(**options) -> list[str]:
        return [record.caption for record in load_images(Data(dataset_name=str(saved), **options)).records]

    assert read(instance_prompt="p") == ["p", "p", "p"]
    assert read(instance_prompt="p", caption_column="text") == ["one", "two", "p"]
    assert read(caption_column="title", max_train_samples=2) == ["t0", "t1"]
    assert read(caption_column="TEXT", instance_prompt="p") == ["one", "two", "p"]
    with pytest.raises(UserError, match=r"row 0 of .*, column n: a caption is a text or a list of texts \(got 1\)"):
        read(caption_column="n")
    assert read(max_train_samples=2) == ["one", "two"]
    with pytest.raises(UserError, match=r"row 2 of .* has no caption"):
        read()
    with pytest.raises(UserError, match=r"no column 'img'.*image, text, title, n"):
        read(image_column="img")
    with pytest.raises(UserError, match=r"no column 'words'.*image, text, title, n"):
        read(caption_column="words")
    with pytest.raises(UserError, match=r"column 'n' of .* holds no images"):
        read(image_column="n")


def test_what_is_said_of_a_data_set(saved):
    def images(**options):
        return load_images(Data(dataset_name=str(saved), instance_prompt="p", **options))

    [note] = images().notes
    assert note.startswith("the column text of") and "With --caption_column text it would be" in note
    [note] = images(caption_column="text").notes
    assert note.startswith("1 of 3 rows") and note.endswith('have an empty text and get the prompt "p"')
    titled = images(caption_column="title", max_train_samples=2)
    assert titled.notes == () and titled.records[0].captions == ("t0", "u0")
    assert [(e.name, e.use, e.source, e.texts) for e in titled.account] == [
        ("row-000000", "image", "column title", ("t0", "u0")),
        ("row-000001", "image", "column title", ("t1",)),
    ]
    assert [entry.source for entry in images(caption_column="text").account][1:] == ["column text", "--instance_prompt"]


def test_both_usual_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [Image.new("RGB", (8, 8))], "text": ["a"], "caption": ["b"]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match="the columns 'text' and 'caption': say which one"):
        load_images(Data(dataset_name=str(tmp_path / "both")))
    assert load_images(Data(dataset_name=str(tmp_path / "both"), instance_prompt="p")).records[0].caption == "p"


def test_dataset_images(saved):
    records = load_images(Data(dataset_name=str(saved), instance_prompt="p")).records
    assert [record.open().getpixel((0, 0)) for record in records] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert all(record.known == record.decoded_facts() for record in records)
    assert len({record.content_hash() for record in records}) == 3


def test_streamed_rows_are_those_of_the_data_set(saved, tmp_path):
    options = {"dataset_name": str(saved), "caption_column": "title", "latents_cache_dir": tmp_path}
    plain = load_images(Data(**options)).records
    streamed = load_images(Data(**options, streaming=True)).records
    assert [(r.caption, r.facts) for r in streamed] == [(r.caption, r.facts) for r in plain]
    assert [r.load() for r in streamed] == [r.load() for r in plain]
    assert [r.caption for r in load_images(Data(**options, streaming=True, max_train_samples=2)).records] == [
        "t0",
        "t1",
    ]
    with pytest.raises(UserError, match=r"row 2 of .* has no caption"):
        load_images(Data(dataset_name=str(saved), latents_cache_dir=tmp_path, streaming=True))
    with pytest.raises(UserError, match="no column 'img'"):
        load_images(Data(dataset_name=str(saved), streaming=True, image_column="img"))
    with pytest.raises(UserError, match=r"column 'n' of .* holds no images"):
        load_images(Data(**options, streaming=True, image_column="n"))


def test_a_kept_image_of_a_stream_is_what_its_name_says(saved, tmp_path):
    """Another file in its place, a link or a pipe is replaced; it was believed."""
    data = Data(dataset_name=str(saved), caption_column="title", latents_cache_dir=tmp_path, streaming=True)
    before = [record.load() for record in load_images(data).records]
    files = sorted(file for file in (tmp_path / "streamed").rglob("*") if file.is_file())
    files[0].write_bytes(files[1].read_bytes())
    files[1].unlink()
    os.mkfifo(files[1])
    assert [record.load() for record in load_images(data).records] == before


def test_a_stream_of_files(tmp_path):
    """Not a saved data set: the builder's own stream, fetched row by row."""
    pytest.importorskip("datasets")
    save(tmp_path / "data" / "train", "a.png", "b.png")
    rows = [{"file_name": "b.png", "text": "bee"}, {"file_name": "a.png", "text": "ay"}]
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = Data(dataset_name=str(tmp_path / "data"), streaming=True, latents_cache_dir=tmp_path / "cache")
    found = {record.caption: record.load() for record in load_images(data, cache_dir=tmp_path / "hub").records}
    files = {"ay": "a.png", "bee": "b.png"}
    assert found == {caption: (tmp_path / "data" / "train" / name).read_bytes() for caption, name in files.items()}


@pytest.mark.parametrize("streaming", [False, True])
def test_two_runs_on_one_data_set(saved, tmp_path, streaming):
    data = Data(dataset_name=str(saved), instance_prompt="p", streaming=streaming, latents_cache_dir=tmp_path)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: load_images(data).records, range(4)))
    assert all([record.facts for record in records] == [record.facts for record in both[0]] for records in both)


def test_two_runs_on_one_folder(tmp_path):
    save(tmp_path / "photos", *(f"{n}.png" for n in range(20)))
    data = Data(instance_data_dir=tmp_path / "photos", instance_prompt="p", latents_cache_dir=tmp_path / "cache")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: load_images(data).records, range(4)))
    assert all([record.facts for record in records] == [record.facts for record in both[0]] for records in both)


def test_local_files_of_any_builder(tmp_path):
    """An image folder with metadata, in a split that is not "train"."""
    pytest.importorskip("datasets")
    save(tmp_path / "data" / "test", "a.png", "b.png")
    rows = [{"file_name": "b.png", "text": "bee"}, {"file_name": "a.png", "text": "ay"}]
    (tmp_path / "data" / "test" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    records = load_images(Data(dataset_name=str(tmp_path / "data")), cache_dir=tmp_path / "cache").records
    found = {record.caption: record.content_hash() for record in records}
    with_prompt = load_folder(tmp_path / "data" / "test").records
    assert found == {record.caption: record.content_hash() for record in with_prompt} and set(found) == {"ay", "bee"}


def test_missing_dataset_and_package(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot load --dataset_name"):
        load_images(Data(dataset_name="gone/set", instance_prompt="p"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .dreamlora\[datasets\]"):
        load_images(Data(dataset_name="x"))


# --- hold-out ---


def pictures(count: int) -> list[ImageRecord]:
    return [ImageRecord.from_image(f"{i}", "c", Image.new("RGB", (2, 2), (i % 256, i // 256, 7))) for i in range(count)]


@pytest.mark.parametrize(
    "count, held", [(1, 0), (5, 0), (6, 1), (9, 1), (10, 2), (11, 2), (12, 2), (20, 4), (80, 16), (300, 16)]
)
def test_default_holdout(count, held):
    train, held_out = split_holdout(pictures(count), None)
    assert (len(train), len(held_out)) == (count - held, held)


def test_explicit_holdout():
    records = pictures(4)
    assert [[*side] for side in split_holdout(records, 0)] == [records, []]
    assert len(split_holdout(records, 3)[1]) == 3
    assert [[*side] for side in split_holdout([], 0)] == [[], []]
    with pytest.raises(UserError, match=r"--holdout 4 leaves nothing.*4 different"):
        split_holdout(records, 4)
    with pytest.raises(UserError, match="leaves nothing"):
        split_holdout(records[:1] * 5, 1)


def test_holdout_does_not_depend_on_order_or_names():
    records = pictures(30)
    held = {record.content_hash() for record in split_holdout(records, None)[1]}
    renamed = [ImageRecord(f"z{r.name}", r.caption, r.read, r.where) for r in reversed(records)]
    assert {record.content_hash() for record in split_holdout(renamed, None)[1]} == held


def test_a_new_image_changes_little():
    records = pictures(60)
    for count in range(6, 60):
        before = {record.name for record in split_holdout(records[:count], None)[1]}
        after = {record.name for record in split_holdout(records[: count + 1], None)[1]}
        assert len(before ^ after) <= 2


def test_copies_stay_on_one_side():
    records = pictures(10)
    train, held_out = split_holdout(records * 3, None)
    assert len(held_out) == 6 and len(train) == 24
    assert not {r.content_hash() for r in train} & {r.content_hash() for r in held_out}
