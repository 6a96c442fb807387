"""What metadata files of others may do: name images of their folder, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.data import caption_text, metadata
from dreamlora.data.folder import load_folder
from dreamlora.errors import UserError
from tests.data.odd_folder import picture
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with an image and a sub-folder, beside another with a private photo and its caption."""
    for number, name in enumerate(("photos/a.png", "photos/sub/b.png", "private/p.png", "private/p..png")):
        picture(tmp_path / name, number)
    (tmp_path / "private" / "p.txt").write_text("private", encoding="utf-8")
    return tmp_path / "photos"


def rows(folder: Path, *names: Any) -> Path:
    text = "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../private/p.png",
        "sub/../../private/p.png",
        "./../private/p.png",
        "..",
        "sub/..",
        "sub/../a.png",
        "sub/./../a.png",
        "{private}/p.png",
        "{photos}/../private/p.png",
        "{photos}x/p.png",
        "//etc/passwd.png",
        "/dev/stdin.png",
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_names_never_leave_the_folder(photos: Path, name: str, kind: str) -> None:
    written = name.format(private=photos.parent / "private", photos=photos)
    if kind == "csv":
        (photos / "metadata.csv").write_text(f'file_name,text\n"{written}",x\n', encoding="utf-8")
    else:
        rows(photos, written)
    with pytest.raises(UserError, match=rf"metadata\.{kind}, line [12]: .* (lies outside of the folder|has no ending)"):
        load_folder(photos, "prompt")


@pytest.mark.parametrize(
    "name",
    [
        "~/p.png",
        "..\\private\\p.png",
        "C:\\private\\p.png",
        "file:///etc/passwd.png",
        "https://example.com/p.png",
        "zip://a.png::x.zip",
        "a.png\0.png",
        "a.png\n.png",
        "\udcff.png",
        "a" * 5000 + ".png",
        "a/" * 50_000 + "b.png",
        "9" * 5000 + ".png",
    ],
)
def test_odd_names_are_names_of_no_file(photos: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"line 1: .*(there is no file|can be no name of|has no ending of)") as error:
        load_folder(rows(photos, name), "prompt")
    assert len(str(error.value)) < 1000 and "there is .." not in str(error.value)


def test_no_link_leads_to_another_folder(photos: Path) -> None:
    (photos / "more").symlink_to(photos.parent / "private")
    with pytest.raises(UserError, match=r"line 1: .*more leads out of .*photos through a link"):
        load_folder(rows(photos, "more/p.png"), "prompt")
    (photos / "again").symlink_to(photos / "sub")
    assert [record.name for record in load_folder(rows(photos, "again/b.png"), "prompt").records] == [
        "a.png",
        "again/b.png",
    ]


def test_links_to_files_are_followed_and_told_with_where_they_lead(photos: Path) -> None:
    private = photos.parent / "private"
    (photos / "p.png").symlink_to("../private/p.png")
    (photos / "sub" / "q.png").symlink_to(private / "p..png")
    (photos / "sub" / "q.txt").symlink_to(private / "p.txt")
    (photos / "metadata.csv").write_text("file_name\nsub/q.png\n", encoding="utf-8")
    images = load_folder(photos, "prompt")
    assert {one.name: one.caption for one in images.records} == {
        "a.png": "prompt",
        "p.png": "prompt",
        "sub/q.png": "private",
    }
    [note] = [note for note in images.notes if "behind" in note]
    told = f"p.png (to ../private/p.png), sub/q.png (to {private}/p..png), sub/q.txt (to {private}/p.txt)"
    assert note == f"3 files of {photos} lie elsewhere, behind links: {told}"


def test_pipes_are_no_images(photos: Path) -> None:
    """Hidden entries and those of sub-folders are looked at only when the metadata names them."""
    os.mkfifo(photos / ".pipe.png")
    os.mkfifo(photos / "sub" / "pipe.png")
    with pytest.raises(UserError, match=r"there is no file .*sub/pipe\.png"):
        load_folder(rows(photos, "sub/pipe.png"), "prompt")
    [pipe] = [one for one in load_folder(rows(photos, ".pipe.png"), "prompt").records if "pipe" in one.name]
    with pytest.raises(UserError, match="pipe or device, not a file"):
        pipe.open()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'{{"file_name": "a.png", "text": "{"x" * 10_001}"}}', "line 1: a text of 10,001 characters is too long"),
        (json.dumps({"file_name": "a.png", "text": ["x"] * 1001}), "line 1: 1,001 captions are too many for an image"),
        (f'{{"file_name": "a.png", "n": {"9" * 5000}}}', "line 1: not JSON that can be read"),
        (f'{{"file_name": "a.png", "n": {"9" * 30}}}', "line 1: not JSON that can be read .*100 bits"),
        ('{"file_name": "a.png", "n": ' + "[" * 100_000, "line 1: not JSON that can be read .*nested deeper"),
        (f'{{"file_name": "a.png", "text": "{"x" * 2**20}"}}', r"line 1 is longer than a row can be \(1024 KiB\)"),
        ("x" * 2**21, r"line 1 is longer than a row can be"),
        (json.dumps({str(n): 1 for n in range(1001)}), "line 1 has 1,001 columns: 1,000 are the most"),
        (
            "\n".join(json.dumps({f"{row}-{n}": 1 for n in range(900)}) for row in range(2)),
            "more than 1,000 columns in all",
        ),
    ],
)
def test_rows_have_bounds(photos: Path, text: str, words: str) -> None:
    (photos / "metadata.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        load_folder(photos, "prompt")
    assert len(str(error.value)) < 2000


def test_tables_have_bounds(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = photos / "metadata.csv"
    for text, words in (
        (f'file_name,text\na.png,"{"x" * 10_001}"\n', "line 2: a text of 10,001 characters is too long"),
        (",".join(map(str, range(1001))) + "\n", "has 1,001 columns"),
        ("," * 2**21, "line 1 is longer than a row can be"),
        ("file_name,text\na.png," + "x" * 2**21, "line 2 is longer than a row can be"),
        ('file_name,text\na.png,"' + "b.png\n" * 200_000, "field larger than field limit"),
        ('file_name,text\na.png,"[""x"",' + "[" * 5000 + '"\n', ""),
    ):
        file.write_text(text, encoding="utf-8")
        assert words in str(harmless(lambda: load_folder(photos, "prompt")))
    monkeypatch.setattr(metadata, "METADATA_BYTES", 10)
    with pytest.raises(UserError, match=r"metadata\.csv is larger than metadata can be"):
        load_folder(photos, "prompt")


def test_the_bounds_are_what_real_files_need() -> None:
    assert metadata.METADATA_BYTES >= 200 * 1_000_000  # a million images
    assert caption_text.MOST_CAPTIONS >= 100 and caption_text.MOST_COLUMNS >= 500


ROWS = [{"file_name": "a.png", "text": "a photo"}, {"file_name": "sub/b.png", "text": ["one", "two"], "n": 3.5}]
TABLE = b'file_name,text,n\na.png,"a photo, of a ""dog""",3\nsub/b.png,two,4\n'


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("a.png", "sub/b.png")):
        picture(folder / name, number)
    return folder


def read(folder: Path, name: str, content: bytes) -> Any:
    file = folder / name
    file.write_bytes(content)
    try:
        return harmless(lambda: load_folder(folder, "prompt"))
    finally:
        file.unlink()


def lines(content: Any) -> bytes:
    return b"\n".join(map(as_json, content)) if isinstance(content, list) else as_json(content)


@fuzzed
@given(content=st.one_of(damaged(lines(ROWS)), changed(ROWS).map(lines)))
def test_fuzz_jsonl(named: Path, content: bytes) -> None:
    read(named, "metadata.jsonl", content)


@fuzzed
@given(content=damaged(TABLE))
def test_fuzz_csv(named: Path, content: bytes) -> None:
    read(named, "metadata.csv", content)
