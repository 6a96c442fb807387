"""Caption files of others: texts of some length, and nothing that could hang."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.data.entries import Entries
from dreamlora.data.folder import load_folder
from dreamlora.errors import UserError
from tests.data.odd_folder import picture
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    picture(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "x" * 10_001, r"a\.txt: a text of 10,001 characters is too long: 10,000 are the most"),
        ("a.txt", "x y " * 2**20, r"cannot read .*a\.txt: it has more than the 1 MiB"),
        ("a.caption", "x\n" * 6000, "a text of 11,999 characters"),
        ("a.json", json.dumps("x" * 10_001), r"a\.json: a text of 10,001 characters"),
        ("a.json", json.dumps({"text": ["x"] * 1001}), r"a\.json: 1,001 captions are too many"),
        ("a.json", '{"text": "x", "score": ' + "9" * 5000 + "}", r"a\.json is not JSON"),
        ("a.json", "[" * 100_000, r"a\.json is not JSON \(it is nested deeper than 32 levels\)"),
        ("a.json", json.dumps(dict.fromkeys(map(str, range(2000)))), r"a\.json has 2,000 columns"),
        ("a.json", '{"text": "x", "text": "y"}', r"a\.json has the column text twice"),
        ("a.json", json.dumps({"x" * 5000: 1}), r"a\.json has no text or caption"),
    ],
)
def test_captions_have_bounds(photos: Path, name: str, text: str, words: str) -> None:
    file = photos / name
    file.write_text(text, encoding="utf-8")
    try:
        result = str(harmless(lambda: load_folder(photos)))
        with pytest.raises(UserError, match=words):
            load_folder(photos)
        assert len(result) < 2000
    finally:
        file.unlink()


def test_every_line_has_the_bound_of_a_caption(photos: Path) -> None:
    file = photos / "a.txt"
    file.write_text("\n".join(["x" * 9000] * 20), encoding="utf-8")
    try:
        with pytest.raises(UserError, match="a text of 180,019 characters"):
            load_folder(photos)
        [record] = load_folder(photos, captions_per_line=True).records
        assert len(record.captions) == 20
        file.write_text("x\n" * 1001, encoding="utf-8")
        with pytest.raises(UserError, match="1,001 captions are too many"):
            load_folder(photos, captions_per_line=True)
    finally:
        file.unlink()


def test_a_caption_that_becomes_a_pipe_is_not_waited_for(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes stop the run when the folder is listed; this one comes later."""
    file = photos / "a.txt"
    listing = Entries.read

    def swapped(self: Entries, flag: str) -> None:
        listing(self, flag)
        file.unlink()
        os.mkfifo(file)

    file.write_text("x", encoding="utf-8")
    monkeypatch.setattr(Entries, "read", swapped)
    try:
        with pytest.raises(UserError, match=r"a\.txt: it is a pipe or device"):
            load_folder(photos)
    finally:
        file.unlink()


BOORU = {"caption": ["a dog", "two"], "tags": ["x", "y"], "score": 3, "rating": None, "source": {"id": 2**40}}


@fuzzed
@given(content=st.one_of(damaged(as_json(BOORU)), changed(BOORU).map(as_json)))
def test_fuzz_json(photos: Path, content: bytes) -> None:
    read(photos / "a.json", content)


@fuzzed
@given(content=damaged("a dog, 日本\ntwo\n".encode()), per_line=st.booleans())
def test_fuzz_text(photos: Path, content: bytes, per_line: bool) -> None:
    read(photos / "a.txt", content, per_line)


def read(file: Path, content: bytes, per_line: bool = False) -> None:
    file.write_bytes(content)
    try:
        harmless(lambda: load_folder(file.parent, "prompt", captions_per_line=per_line))
    finally:
        file.unlink()
