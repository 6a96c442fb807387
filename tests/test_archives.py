"""Headers that promise more than there is: told at once, whatever the file says of itself."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save as safetensors_bytes

from dreamlora.archives import NAME_LENGTH, TENSORS, check_archive, open_tensors
from dreamlora.reading import UnreadableError
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless

SOUND = safetensors_bytes(
    {"a.lora_A.weight": np.ones((2, 3), np.float32), "a.lora_B.weight": np.ones((3, 2), np.float32)}
)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def empty_tensors(count: int) -> bytes:
    entries = (f'"k{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(count))
    return with_header(b"{" + ",".join(entries).encode() + b"}")


def named(name: str) -> bytes:
    return with_header(json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(), bytes(4))


def shaped(shape: list[int], size: int = 4) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    return with_header(json.dumps({"a": entry}).encode(), bytes(size))


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a header of 2^62 bytes": (lambda: struct.pack("<Q", 2**62) + b"{}", "header"),
    "a header of 100 MB": (lambda: with_header(b'{"a":"' + b" " * 100_000_000 + b'"}'), "header"),
    "nested lists": (lambda: with_header(b"[" * 10**6), "not a safetensors"),
    "a million tensors": (lambda: empty_tensors(10**6), "header"),
    "many tensors": (lambda: empty_tensors(TENSORS + 1), f"at most {TENSORS}"),
    "a long name": (lambda: named("x" * (NAME_LENGTH + 1)), "no tensor can have the name"),
    "a newline": (lambda: named("a\nb"), "no tensor can have the name"),
    "a zero": (lambda: named("a\0b"), "no tensor can have the name"),
    "escapes": (lambda: named("\x1b[2J"), "no tensor can have the name"),
    "a huge shape": (lambda: shaped([2**40]), "not a safetensors"),
    "a shape beyond counting": (lambda: shaped([2**40, 2**40]), "not a safetensors"),
    "an empty tensor with a side beyond counting": (lambda: shaped([0, 2**63], 0), "cannot have the shape"),
    "an empty tensor of 70 sides": (lambda: shaped([0] * 70, 0), "cannot have the shape"),
    "nothing": (lambda: b"", "not a safetensors"),
    "a pickle": (lambda: b"\x80\x04\x95.", "not a safetensors"),
}


@pytest.mark.parametrize(("content", "words"), BOMBS.values(), ids=BOMBS)
def test_header_bombs(content: Callable[[], bytes], words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content())

    def read() -> None:
        with open_tensors(file):
            pass

    error = harmless(read)
    assert isinstance(error, UnreadableError) and words in str(error) and len(str(error)) < 600


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "pipe.safetensors")
    started = time.monotonic()
    for name in ("pipe", "folder", "link"):
        with pytest.raises(UnreadableError, match="not a file"), open_tensors(tmp_path / f"{name}.safetensors"):
            pass
    assert time.monotonic() - started < 5, "a pipe was waited for"


def test_a_sound_file_and_links_to_it(tmp_path: Path) -> None:
    outside, folder = tmp_path / "a.safetensors", tmp_path / "run"
    folder.mkdir()
    outside.write_bytes(SOUND)
    (folder / "link.safetensors").symlink_to(outside)
    with open_tensors(folder / "link.safetensors", "np") as opened:
        assert opened.get_tensor("a.lora_A.weight").shape == (2, 3)
    with (
        pytest.raises(UnreadableError, match=r"link leads out of .*cp -rL"),
        open_tensors(folder / "link.safetensors", "np", folder),
    ):
        pass


@fuzzed
@given(
    st.one_of(
        damaged(SOUND),
        changed(json.loads(SOUND[8 : 8 + struct.unpack("<Q", SOUND[:8])[0]])).map(
            lambda header: with_header(as_json(header), SOUND[-48:])
        ),
    )
)
def test_fuzz_headers(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(content)

    def read() -> None:
        with open_tensors(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 - no iterator
                opened.get_tensor(name)

    harmless(read)


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as made:
        for name, entry in entries.items():
            made.writestr(name, entry)
    return content.getvalue()


def overlapping() -> bytes:
    """Ten names of the same megabyte."""
    whole = archive({f"{number}.npy": b"x" for number in range(10)} | {"big.npy": bytes(2**20)})
    with zipfile.ZipFile(io.BytesIO(whole)) as read:
        start, big = read.start_dir, read.getinfo("big.npy")
    directory = bytearray(whole[start:])
    position = 0
    for _ in range(10):
        position = directory.index(b"PK\x01\x02", position)
        directory[position + 16 : position + 28] = struct.pack("<LLL", big.CRC, big.file_size, big.file_size)
        position += 4
    return whole[:start] + bytes(directory)


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "unpacks to much": (lambda: archive({"a.npy": bytes(10**7)}, zipfile.ZIP_DEFLATED), "packed"),
    "two of a name": (lambda: archive({"data.pkl": b"a", "DATA.PKL": b"b"}), "same name"),
    "overlapping": (overlapping, "overlap"),
    "something before it": (lambda: b"x" + archive({"a.npy": b"a"}), "no archive"),
    "no archive": (lambda: b"PK\x03\x04", "no archive"),
    "a huge directory": (
        lambda: b"PK\x03\x04" + bytes(2**24) + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 2**24, 0, 0),
        "larger than any",
    ),
}


@pytest.mark.parametrize(("content", "words"), ARCHIVES.values(), ids=ARCHIVES)
def test_archives_that_are_more_than_they_look(content: Callable[[], bytes], words: str) -> None:
    error = harmless(lambda: check_archive(io.BytesIO(content())), ValueError)
    assert words in str(error)


@fuzzed
@given(damaged(archive({"a.npy": b"one", "b.npy": b"another"})))
def test_fuzz_archives(content: bytes) -> None:
    harmless(lambda: check_archive(io.BytesIO(content)), ValueError)
