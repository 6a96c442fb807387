"""Files are read as far as they are what they should be, and never wait, grow or execute."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Le
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict

from dreamlora import reading
from dreamlora.reading import Schema, UnreadableError, json_of, read_bytes, read_json, read_lines, yaml_of
from tests.fuzzing import SECONDS, as_json, changed, damaged, fuzzed, harmless


class Shelf(TypedDict):
    books: Annotated[int, Ge(0), Le(10)]
    names: list[str]


SHELF = Schema(Shelf)
SOUND = {"books": 2, "names": ["a", "b"]}


def test_what_the_schema_knows_is_read_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "shelf.json"
    file.write_bytes(as_json({**SOUND, "more": 1}))
    assert read_json(file, SHELF) == SOUND


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**SOUND, "books": "2"}, "books: Input should be a valid integer (got '2')"),
        ({**SOUND, "books": True}, "books: Input should be a valid integer"),
        ({**SOUND, "books": 11}, "books: Input should be less than or equal to 10 (got 11)"),
        ({**SOUND, "books": float("nan")}, "books: Input should be a valid integer (got None)"),
        ({**SOUND, "names": ["a", 1]}, "names.1: Input should be a valid string (got 1)"),
        ({"books": 2}, "names: Field required"),
        ([SOUND], "Input should be a valid dictionary (got a list of 1)"),
        ({**SOUND, "books": "x" * 10**6}, "(got 'xxx"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, content: Any, words: str) -> None:
    file = tmp_path / "shelf.json"
    file.write_bytes(as_json(content))
    with pytest.raises(UnreadableError) as caught:
        read_json(file, SHELF)
    assert f"cannot read {file}: " in str(caught.value) and words in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 300_000, "nested deeper than 32"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested deeper than 32"),
        ("9" * 5000, "4300 digits"),
        ("9" * 30, "whole number of 100 bits"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        json_of(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 300_000, "nested deeper than 32"),  # the C parser would end the whole process
        ("a: &x [1]\nb: [*x, *x]", r"line 2 refers to another place of the file \(\*x\)"),
        ("a: &x [*x]", "refers to another place"),
        ("a: !!python/object/apply:os.system [id]", "has a tag"),
        ("a: !!binary aGVsbG8=", "has a tag"),
        ("a: 0x" + "f" * 40, "whole number of 160 bits"),
        ("? [1]\n: 2", "unhashable key in line 1, column 3"),
        ("a: [1", "not valid YAML"),
        ("a: \0", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        yaml_of(text)


def test_values_are_those_of_json() -> None:
    assert yaml_of("a: 2001-01-01\nb: .nan\n3: .inf\nc: no") == {"a": "2001-01-01", "b": None, "3": None, "c": False}
    assert json_of('{"a": NaN, "b": -Infinity, "c": 1e999}') == {"a": None, "b": None, "c": None}


def test_pipes_devices_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "pipe"), (tmp_path, "folder"), (Path("/dev/zero"), "device")):
        with pytest.raises(UnreadableError, match=kind):
            read_bytes(path, 10)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none", 10)


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret"
    run.mkdir()
    secret.write_text("key", encoding="utf-8")
    (run / "own").write_text("own", encoding="utf-8")
    (run / "to_own").symlink_to("own")
    (run / "out").symlink_to(secret)
    (run / "folder_out").symlink_to(tmp_path)
    (run / "circle").symlink_to("circle")
    (tmp_path / "way").symlink_to(run)
    assert read_bytes(tmp_path / "way" / "to_own", 10, tmp_path / "way") == b"own"
    assert read_bytes(run / "out", 10) == b"key"  # of a folder that the person names links are followed
    for name in ("out", "folder_out/secret", "circle", "../secret"):
        with pytest.raises(UnreadableError):
            read_bytes(run / name, 10, run)


def test_files_have_a_largest_size(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(UnreadableError, match="more than the 0 KiB"):
        read_bytes(file, 4)


def test_long_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"a\n" + b"x" * 3000 + b"\nb\n" + b"y" * 10 + b"\nlast")
    assert list(read_lines(file, most=10)) == [(1, b"a\n"), (2, None), (3, b"b\n"), (4, None), (5, b"last")]


@fuzzed
@given(damaged(b"books: 2\nnames: [a, b]\n"))
def test_fuzz_yaml(content: bytes) -> None:
    harmless(lambda: SHELF.check(yaml_of(content.decode("utf-8", "replace"))), ValueError)


@fuzzed
@given(st.one_of(damaged(as_json(SOUND)), changed(SOUND).map(as_json)))
def test_fuzz_json(content: bytes) -> None:
    harmless(lambda: SHELF.check(json_of(content)), ValueError)


def test_a_reader_that_grabs_memory_or_time_is_found() -> None:
    with pytest.raises(MemoryError):
        harmless(lambda: bytes(2 * 2**30))

    def busy() -> None:
        end = time.process_time() + SECONDS
        while time.process_time() < end:
            pass

    with pytest.raises(AssertionError, match="took"):
        harmless(busy)


def test_the_bounds_are_what_real_files_need() -> None:
    assert reading.YAML_BYTES >= 10 * 2**10 and reading.JSON_BYTES >= 2**25
