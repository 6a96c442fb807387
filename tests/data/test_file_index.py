"""Files that were read before: when they are believed, and what happens where the index cannot be used."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.data import file_index
from dreamlora.data.file_index import INDEX_FILE, FileIndex, stamp_of
from dreamlora.data.images import ImageFacts
from dreamlora.data.rgb import Opacity
from tests.fuzzing import damaged, fuzzed, harmless, odd_values

FACTS = ImageFacts("ab" * 32, (3, 4))


def test_remembered_under_the_same_stamp_only(tmp_path: Path) -> None:
    index = FileIndex(tmp_path)
    index.put("/x", "1/2", FACTS)
    index.close()
    again = FileIndex(tmp_path)
    assert again.get("/x", "1/2") == FACTS
    again.put("/odd", "1", FACTS._replace(profile_unused=True, opacity=Opacity.PARTLY))
    assert again.get("/x", "1/3") is None and again.get("/y", "1/2") is None
    again.put("/x", "1/3", ImageFacts("cd" * 32, (5, 6)))
    again.close()
    assert FileIndex(tmp_path).get("/x", "1/3") == ImageFacts("cd" * 32, (5, 6))
    assert FileIndex(tmp_path).get("/odd", "1") == ImageFacts("ab" * 32, (3, 4), True, Opacity.PARTLY)


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


def filled(folder: Path) -> Path:
    index = FileIndex(folder)
    index.put("/x", "1", FACTS)
    index.close()
    return folder / INDEX_FILE


def changed_by(command: str) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        with sqlite3.connect(file) as db:
            db.execute(command)

    return change


def test_the_index_of_the_version_before_is_read(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / INDEX_FILE) as db:
        db.execute(
            "\nCREATE TABLE IF NOT EXISTS images (\n    path TEXT PRIMARY KEY, stamp TEXT, decoder TEXT, hash BLOB, "
            "width INT, height INT, profile_unused INT,\n    opacity INT\n)\n"
        )
        row = ("/x", "1", PIL.__version__, bytes.fromhex("ab" * 32), 3, 4, 0, 0)
        db.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    assert FileIndex(tmp_path).get("/x", "1") == FACTS


def test_one_with_other_tables_is_not_and_what_to_do_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sqlite3.connect(tmp_path / INDEX_FILE) as db:
        db.execute("CREATE TABLE files (path TEXT PRIMARY KEY, stamp TEXT, hash BLOB, width INT, height INT)")
    FileIndex(tmp_path).close()
    assert f"({tmp_path / INDEX_FILE} holds other things than the index: remove it)" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        changed_by("CREATE TRIGGER t AFTER INSERT ON images BEGIN DELETE FROM images; END"),
        changed_by("CREATE VIEW v AS SELECT * FROM images"),
        changed_by("CREATE TABLE more (x)"),
        changed_by("CREATE INDEX i ON images (hash || stamp)"),
        changed_by("ALTER TABLE images RENAME COLUMN hash TO digest"),
        changed_by("ALTER TABLE images ADD COLUMN g GENERATED ALWAYS AS (length(path)) VIRTUAL"),
        lambda file: (file.unlink(), changed_by("CREATE VIEW images AS SELECT 1 AS path, zeroblob(1e9) AS hash")(file)),
        lambda file: (file.unlink(), os.mkfifo(file)),
        lambda file: (file.rename(file.with_name("away")), file.symlink_to(file.with_name("away"))),
        lambda file: file.with_name(INDEX_FILE + "-wal").symlink_to("/dev/zero"),
        lambda file: os.mkfifo(file.with_name(INDEX_FILE + "-journal")),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_an_index_that_holds_other_things_is_not_used(
    tmp_path: Path, change: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """A trigger would act whenever something is remembered; a pipe would be waited for, for ever."""
    change(filled(tmp_path))
    index = FileIndex(tmp_path)
    assert index.get("/x", "1") is None
    index.put("/x", "1", FACTS)
    index.close()
    assert caplog.text.count("cannot be used") == 1


@pytest.mark.parametrize("column", ["hash", "width", "height", "profile_unused", "opacity"])
@pytest.mark.parametrize("value", ["text", b"", b"\0" * 31, -1, 0.5, 2**40, None])
def test_a_row_of_other_types_is_not_believed(tmp_path: Path, column: str, value: object) -> None:
    file = filled(tmp_path)
    with sqlite3.connect(file) as db:
        db.execute(f"UPDATE images SET {column} = ?", (value,))
    assert FileIndex(tmp_path).get("/x", "1") is None


def test_a_value_of_megabytes_is_not_read(tmp_path: Path) -> None:
    file = filled(tmp_path)
    changed_by("UPDATE images SET hash = zeroblob(300000000)")(file)
    assert FileIndex(tmp_path).get("/x", "1") is None


def test_an_index_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    monkeypatch.setattr(file_index, "counts", lambda owner, folder: False)
    assert FileIndex(tmp_path).get("/x", "1") is None and "written by another user" in caplog.text


@pytest.fixture(scope="module")
def fuzzed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


def _sound() -> bytes:
    memory = sqlite3.connect(":memory:")
    memory.execute(file_index._TABLE)
    memory.execute("INSERT INTO images VALUES ('/x', '1', ?, ?, 3, 4, 0, 0)", (PIL.__version__, b"1" * 32))
    memory.commit()
    return memory.serialize()


@fuzzed
@given(content=damaged(_sound()))
def test_fuzz_index(fuzzed_folder: Path, content: bytes) -> None:
    for file in fuzzed_folder.iterdir():
        file.unlink()
    (fuzzed_folder / INDEX_FILE).write_bytes(content)

    def use() -> None:
        index = FileIndex(fuzzed_folder)
        index.get("/x", "1")
        index.put("/y", "1", FACTS)
        index.close()

    harmless(use)


@fuzzed
@given(row=st.tuples(odd_values, odd_values, odd_values, odd_values, odd_values))
def test_fuzz_rows(row: tuple[object, ...]) -> None:
    assert harmless(lambda: file_index._facts(*row)) is None
