"""Files that were read before: when they are believed, and what happens where the index cannot be used."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dreamlora.data import file_index
from dreamlora.data.file_index import INDEX_FILE, FileIndex, stamp_of
from dreamlora.data.images import ImageFacts

FACTS = ImageFacts("ab" * 32, (3, 4))


def test_remembered_under_the_same_stamp_only(tmp_path: Path) -> None:
    index = FileIndex(tmp_path)
    index.put("/x", "1/2", FACTS)
    index.close()
    again = FileIndex(tmp_path)
    assert again.get("/x", "1/2") == FACTS
    again.put("/odd", "1", FACTS._replace(profile_unused=True))
    assert again.get("/x", "1/3") is None and again.get("/y", "1/2") is None
    again.put("/x", "1/3", ImageFacts("cd" * 32, (5, 6)))
    again.close()
    assert FileIndex(tmp_path).get("/x", "1/3") == ImageFacts("cd" * 32, (5, 6))
    assert FileIndex(tmp_path).get("/odd", "1") == ImageFacts("ab" * 32, (3, 4), True)


def test_remembered_for_the_pillow_that_decoded_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = FileIndex(tmp_path)
    index.put("/x", "1", FACTS)
    index.close()
    monkeypatch.setattr(file_index.PIL, "__version__", "another")
    assert FileIndex(tmp_path).get("/x", "1") is None


def test_without_a_folder_nothing_is_known() -> None:
    index = FileIndex(None)
    index.put("/x", "1", FACTS)
    index.close()
    assert index.get("/x", "1") is None


def test_a_file_just_written_has_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    file.write_text("1", encoding="utf-8")
    assert stamp_of(file) is None and stamp_of(tmp_path / "gone") is None
    later = time.time() + 60
    monkeypatch.setattr(file_index.time, "time", lambda: later)
    before = stamp_of(file)
    assert before is not None
    os.utime(file, ns=(1, 1))
    assert stamp_of(file) != before


def test_times_set_back_do_not_hide_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time() + 60
    monkeypatch.setattr(file_index.time, "time", lambda: later)
    file = tmp_path / "f"
    file.write_text("1", encoding="utf-8")
    stat, before = file.stat(), stamp_of(file)
    time.sleep(0.02)
    file.write_text("2", encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns and stamp_of(file) != before


def test_unusable_places_only_cost_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / INDEX_FILE).write_bytes(b"no data base" * 100)
    for place in (tmp_path / "file" / "below", tmp_path):
        index = FileIndex(place)
        index.put("/x", "1", FACTS)
        index.close()
        assert index.get("/x", "1") is None
    assert "all files are read" in caplog.text


def test_names_that_are_no_text(tmp_path: Path) -> None:
    index = FileIndex(tmp_path)
    index.put("/\udcff", "1", FACTS)
    index.put("/x", "1", FACTS)
    index.close()
    assert FileIndex(tmp_path).get("/\udcff", "1") is None
