"""Files are whole or not there, have the modes that the umask gives, and leave nothing behind when a write fails."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreamlora.errors import UserError, WriteError
from dreamlora.files import make_folder, remove, replacing, replacing_folder, write_atomically
from tests.limits import file_size_limit


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_modes_are_those_of_the_umask_whatever_library_writes(umask: int, tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "folder") as folder, replacing(folder / "a.safetensors") as file:
        save_file({"a": torch.zeros(1)}, file)
    write_atomically(tmp_path / "new" / "text", "x")
    for file in (tmp_path / "folder" / "a.safetensors", tmp_path / "new" / "text"):
        assert mode(file) == 0o666 & ~umask and mode(file.parent) == 0o777 & ~umask


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half of the n", encoding="utf-8")
        raise RuntimeError
    with file_size_limit(1), pytest.raises(WriteError, match=r"cannot write .*file: "):
        write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), UserError("a mistake"), KeyboardInterrupt()])
def test_a_folder_that_could_not_be_filled_leaves_the_old_one_and_no_rest(error: BaseException, tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "folder") as temporary:
        write_atomically(temporary / "a", "old")
    with pytest.raises(type(error)), replacing_folder(tmp_path / "folder") as temporary:
        write_atomically(temporary / "a", "new")
        raise error
    assert (tmp_path / "folder" / "a").read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_what_the_system_refuses_in_a_folder_is_named_and_leaves_no_rest(tmp_path: Path) -> None:
    refused = pytest.raises(WriteError, match=r"cannot write .*folder")
    with file_size_limit(0), refused, replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_bytes(b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "a", tmp_path / ("n" * 300), tmp_path / "\0"):
        with pytest.raises((WriteError, ValueError)) as refused:
            write_atomically(path, "x")
        with pytest.raises((WriteError, ValueError)):
            make_folder(path)
        assert "\0" in str(path) or str(path) in str(refused.value)


def test_a_folder_that_has_gone_meanwhile_is_told(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="The folder has gone"), replacing(tmp_path / "run" / "file") as temporary:
        remove(tmp_path / "run")
        temporary.write_bytes(b"x")


def test_names_whose_bytes_are_no_text_are_written_and_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"B\xe4r")
    write_atomically(tmp_path / "text", f'"{name} 犬"')
    assert (tmp_path / "text").read_text(encoding="utf-8") == '"B\\udce4r 犬"'


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for _ in range(2):
        remove(tmp_path / "link")
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_reasons_are_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WriteError, match="the disk is full") as error:
        write_atomically(tmp_path / "file", "x")
    assert error.value.disk_full and list(tmp_path.iterdir()) == []
