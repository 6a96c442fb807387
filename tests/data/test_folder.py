"""Every entry of a data folder is used, or named with the reason why it is not; what is likely a mistake stops."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dreamlora.config import Data
from dreamlora.data import entries
from dreamlora.data.dataset import load_images
from dreamlora.data.entries import EntryKind
from dreamlora.data.folder import Images, load_folder
from dreamlora.errors import UserError
from tests.data.odd_folder import IMAGES, STOPPERS, make, picture


def loaded(folder: Path, *flags: str) -> Images:
    options: Any = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True))
    data = Data(
        instance_data_dir=folder, instance_prompt="the prompt", latents_cache_dir=folder.parent / "c", **options
    )
    return load_images(data)


def captions(folder: Path, prompt: str | None = "the prompt", **options: Any) -> dict[str, tuple[str, ...]]:
    return {record.name: record.captions for record in load_folder(folder, prompt, **options).records}


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", STOPPERS)
def test_what_is_likely_a_mistake_stops(tmp_path: Path, name: str) -> None:
    folder, stopper = tmp_path / "photos", STOPPERS[name]
    picture(folder / "a.png")
    stopper.make(folder)
    with pytest.raises(UserError, match=stopper.message):
        loaded(folder, *stopper.flags)


def test_every_entry_is_used_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    expected = make(folder)
    assert len(list(os.scandir(folder))) >= 60
    images = loaded(folder)
    told = {entry.name: entry for entry in images.account}
    hidden = {entry.name for entry in os.scandir(folder) if entry.name.startswith(".")} - {".named.png"}
    assert {entry.name for entry in os.scandir(folder)} - hidden - told.keys() == set()
    assert told.keys() == expected.keys()
    for name, (use, source, text) in expected.items():
        assert (told[name].use, told[name].source) == (use, source), name
        assert text in told[name].texts[0], name
    assert {record.name for record in images.records} == {*IMAGES, "shared.jpg", "shared.png", "copy.jpg", "link.png"}
    notes = " ".join(images.notes)
    assert "1 of 27 images is a copy of another one" in notes and "j.txt. With --captions_per_line" in notes
    assert f"1 file of {folder} lies elsewhere, behind a link: link.png (to {folder.parent / 'elsewhere'}" in notes
    assert "shared.txt (shared.jpg, shared.png)" in notes and "dataset.json" in notes and "Thumbs.db" not in notes


def test_images_beyond_the_limit_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, ord(name[0]))
    data = Data(instance_data_dir=tmp_path, instance_prompt="p", max_train_samples=1, latents_cache_dir=tmp_path / ".c")
    told = list(load_images(data).account)
    assert [(entry.name, entry.use, entry.source) for entry in told[:2]] == [
        ("a.png", "image", "--instance_prompt"),
        ("b.png", "not used", ""),
    ]
    assert told[1].texts == ("an image beyond --max_train_samples",)


@pytest.mark.parametrize(
    ("header", "cell"),
    [("file_name, text", "a.png,red"), ("File_Name,TEXT ", "a.png,red"), (",file_name,text", "0,a.png,red")],
)
def test_headers_with_blanks_or_another_case(tmp_path: Path, header: str, cell: str) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path, "Metadata.CSV", f"{header}\r\n{cell}\r\n")
    assert captions(tmp_path) == {"a.png": ("red",)}


def test_cells_in_quotation_marks(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path, "metadata.csv", 'file_name,text,n\n\na.png, "red, ""very""\nred",3\n,,\n')
    assert captions(tmp_path) == {"a.png": ('red, "very" red',)}


def test_metadata_without_captions(tmp_path: Path) -> None:
    """Names alone, or numbers beside them, say that the prompt is meant."""
    picture(tmp_path / "a.png")
    write(tmp_path, "metadata.csv", "file_name,label,mask_file_name\na.png,3,m.png\n")
    assert captions(tmp_path) == {"a.png": ("the prompt",)}


def test_a_row_may_spell_its_image_in_another_way(tmp_path: Path) -> None:
    for name in ("a.png", "sub/Cafe\u0301.png", "b.PNG"):
        picture(tmp_path / name, len(name))
    names = [str(tmp_path / "a.png"), "sub/./Caf\u00e9.png", "B.png"]
    write(tmp_path, "metadata.jsonl", "\n".join(json.dumps({"file_name": name, "text": name[-5:]}) for name in names))
    assert captions(tmp_path).keys() == {"a.png", "sub/Cafe\u0301.png", "b.PNG"}
    write(tmp_path, "sub/Caf\u00e9.png.txt", "\u00e9.png")
    assert captions(tmp_path)["sub/Cafe\u0301.png"] == ("\u00e9.png",)


def test_a_folder_whose_images_are_all_named(tmp_path: Path) -> None:
    picture(tmp_path / "sub" / "deep" / "a.png")
    write(tmp_path, "metadata.csv", "file_name,text\nsub/deep/a.png,red\n")
    images = load_folder(tmp_path)
    assert [(entry.name, entry.use, entry.texts) for entry in images.account] == [
        ("metadata.csv", "metadata", ("1 row",)),
        ("sub", "folder", ("its images are named in the metadata",)),
        ("sub/deep/a.png", "image", ("red",)),
    ]
    assert images.notes == ()


def test_exact_names_win_over_another_case(tmp_path: Path) -> None:
    for number, name in enumerate(("B.png", "b.png")):
        picture(tmp_path / name, number)
    write(tmp_path, "B.txt", "large")
    write(tmp_path, "b.TXT", "small")
    assert captions(tmp_path) == {"B.png": ("large",), "b.png": ("small",)}


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path, "a.txt", "one\n\n two \nthree")
    assert captions(tmp_path) == {"a.png": ("one two three",)}
    assert captions(tmp_path, captions_per_line=True) == {"a.png": ("one", "two", "three")}


def test_caption_key_of_json(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path, "a.json", '{"description": ["one", " ", null, "two"], "text": "no"}')
    assert captions(tmp_path, caption_column="description") == {"a.png": ("one", "two")}


def test_images_without_captions_among_others_are_named(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        picture(tmp_path / name, number)
    write(tmp_path, "a.txt", "red")
    [note] = load_folder(tmp_path, "the prompt").notes
    assert note.endswith('2 of 3 images in ' + str(tmp_path) + ' have no caption of their own and get the prompt '
                         '"the prompt": b.png, c.png')  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", " \n"), ("metadata.jsonl", '{"file_name": "a.png"}'), ("a.json", '{"text": []}')]
)
def test_empty_captions_are_told(tmp_path: Path, name: str, text: str) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path, name, text)
    assert "1 of 1 images in" in load_folder(tmp_path, "the prompt").notes[0]


def test_numbers_of_files_may_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have one for all."""
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        picture(tmp_path / name, number)
    add = entries.Entries.add
    same = tmp_path.stat()
    monkeypatch.setattr(entries.Entries, "add", lambda self, name, _, *a, **k: add(self, name, same, *a, **k))
    assert len(captions(tmp_path)) == 3


@pytest.mark.parametrize("name", ["README.txt", "license.txt", "notes.txt", "Readme.en.txt"])
def test_files_for_people_do_not_stop(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path, name, "x")
    [note] = load_folder(tmp_path, "the prompt").notes
    assert name in note


def test_only_compared_with(tmp_path: Path) -> None:
    """A folder of references may hold anything beside its images."""
    picture(tmp_path / "a.png")
    for name, text in (
        ("captions.csv", "x"),
        ("a.txt", "x"),
        ("a.caption", "y"),
        ("prompts.txt", "z"),
        ("c.json", "{}"),
    ):
        write(tmp_path, name, text)
    (tmp_path / "b.png").symlink_to("a.png")
    picture(tmp_path / "c.png", 1)
    assert captions(tmp_path, strict=False)["a.png"] == ("x",)


def test_advice_for_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no images \(looked for"):
        load_folder(tmp_path, "p")
    (tmp_path / "x.jpg.d").mkdir()
    (tmp_path / "x.jpg.d" / "round").symlink_to(tmp_path)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "a.jpg")
    (tmp_path / "pipe" / "b.jpg").mkdir()
    with pytest.raises(UserError, match=r"holds no images \(looked for"):
        load_folder(tmp_path, "p")
    picture(tmp_path / "4_sks dog" / "a.png")
    with pytest.raises(UserError, match=r'give .*4_sks dog; kohya.*give --repeats 4 --instance_prompt "sks dog"'):
        load_folder(tmp_path, "p")
    picture(tmp_path / "two" / "a.png")
    with pytest.raises(UserError, match=r"give one of these, or each as a data set of its own: .*, .*; kohya"):
        load_folder(tmp_path, "p")


def test_names_that_are_no_unicode_or_no_text(tmp_path: Path) -> None:
    """What is said of them can be written to any file and terminal."""
    for number, name in enumerate((os.fsdecode(b"caf\xe9"), "a\nb\x1b[2J")):
        picture(tmp_path / f"{name}.png", number)
        picture(tmp_path / f"{name}.jpg", number + 5)
        write(tmp_path, f"{name}.txt", "red")
        write(tmp_path, f"{name}.pdf", "")
    images = load_folder(tmp_path)
    assert [entry.use for entry in images.account] == ["image", "not used", "image", "caption"] * 2
    assert [record.caption for record in images.records] == ["red"] * 4
    notes = " ".join(images.notes)
    assert r"caf\udce9.pdf" in notes and r"a\nb\x1b[2J.pdf" in notes and notes.isprintable()


def test_name_of_the_folder_itself(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks dog" / "a.png")
    [note] = load_folder(tmp_path / "10_sks dog", "p").notes
    assert 'give --repeats 10 --instance_prompt "sks dog"' in note
    assert captions(tmp_path / "10_sks dog", "p") == {"a.png": ("p",)}


def test_sub_folders_are_counted_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "MOST_WALKED", 5)
    for number in range(9):
        picture(tmp_path / "sub" / f"{number}.png", number)
    assert entries.images_below(tmp_path / "sub") == {str(tmp_path / "sub"): 5}


def test_many_names_of_one_file_are_found_in_one_pass(tmp_path: Path) -> None:
    """They were compared in pairs: minutes for twenty thousand."""
    picture(tmp_path / "0.png")
    for number in range(1, 500):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    found = load_folder(tmp_path, "p", strict=False).entries
    assert found is not None
    passed: list[None] = []
    found.db.set_progress_handler(lambda: passed.append(None), 100)
    pairs = list(found.same_files(EntryKind.IMAGE))
    assert pairs[:2] == [("0.png", "1.png"), ("1.png", "2.png")] and len(pairs) == 499
    assert len(passed) * 100 < 200 * 500  # SQLite's instructions for each file
