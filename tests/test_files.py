"""Files are whole or not there, have the modes that the umask gives, and leave nothing behind when a write fails."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dreamlora.errors import UserError, WriteError
from dreamlora.files import (
    make_folder,
    open_at_end,
    remove,
    remove_leftovers,
    replacing,
    replacing_folder,
    write_atomically,
)
from tests.limits import file_size_limit


@pytest.fixture(params=[0o022, 0o002, 0o027, 0o077], ids=oct)
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


# Folders that somebody else has prepared.

STRANGER = 12345


def place_link(link: Path, target: Path, owner: int) -> None:
    """A link in a folder that all may write to."""
    link.symlink_to(target)
    link.parent.chmod(0o777)
    try:
        os.lchown(link, owner, -1)
    except PermissionError:
        pytest.skip("only root may give links away")


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious", encoding="utf-8")
    return tmp_path / "precious"


def append(file: Path) -> None:
    with open_at_end(file) as more:
        more.write(b"x")


def fill(folder: Path) -> None:
    with replacing_folder(folder) as temporary:
        write_atomically(temporary / "file", "x")


WRITERS: dict[str, Callable[[Path], object]] = {
    "whole": lambda folder: write_atomically(folder / "file", "x"),
    "at the end": lambda folder: append(folder / "file"),
    "a folder": lambda folder: fill(folder / "inner"),
    "an empty folder": lambda folder: make_folder(folder / "inner"),
    "in place": make_folder,
    "removed": lambda folder: remove(folder / "file"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("way", [".", "between", "chain"])
def test_nothing_is_written_through_a_link_that_somebody_else_has_placed(
    write: Callable[[Path], object], way: str, precious: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    place_link(shared / "link", precious, STRANGER)
    (tmp_path / "mine").symlink_to(shared / "link")
    folder = {".": shared / "link", "between": shared / "link" / "deeper", "chain": tmp_path / "mine"}[way]
    with pytest.raises(WriteError, match=r"somebody else has placed the link .*A link lies there that is not followed"):
        write(folder)
    assert [file.read_text(encoding="utf-8") for file in precious.iterdir()] == ["precious"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_links_of_ones_own_and_where_nobody_else_can_place_any_count(
    write: Callable[[Path], object], precious: Path, tmp_path: Path
) -> None:
    """outputs/ on a larger disk, a colleague's folder under a link of hers."""
    shared = tmp_path / "shared"
    shared.mkdir()
    place_link(shared / "link", precious, os.getuid())
    write(shared / "link")
    (shared / "hers").symlink_to(precious)
    os.lchown(shared / "hers", STRANGER, -1)
    shared.chmod(0o755)
    write(shared / "hers")


def test_links_in_a_circle_are_an_error_like_others(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for write in WRITERS.values():
        with pytest.raises(WriteError):
            write(tmp_path / "a")


def test_a_link_in_a_files_place_is_replaced_or_refused(precious: Path, tmp_path: Path) -> None:
    for target in (precious / "file", tmp_path / "nowhere"):
        for kind, write in (("whole", write_atomically), ("at the end", lambda file, _: append(file))):
            link = tmp_path / "run" / f"{kind} {target.name}"
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(target)
            if kind == "whole":
                write(link, "new")
                assert not link.is_symlink() and link.read_text(encoding="utf-8") == "new"
            else:
                with pytest.raises(WriteError, match="A link lies there that is not followed"):
                    write(link, "new")
    assert (precious / "file").read_text(encoding="utf-8") == "precious" and not (tmp_path / "nowhere").exists()


def test_a_link_in_a_folders_place_is_replaced(precious: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").symlink_to(precious)
    fill(tmp_path / "folder")
    assert not (tmp_path / "folder").is_symlink()
    assert (precious / "file").read_text(encoding="utf-8") == "precious"


def test_only_a_regular_file_of_one_name_is_written_on(precious: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "second").hardlink_to(precious / "file")
    for name, words in (("pipe", "it is a pipe"), ("second", "it has a second name"), ("precious", "Is a directory")):
        with pytest.raises(WriteError, match=words):
            append(tmp_path / name)
    append(tmp_path / "new")
    append(tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == b"xx"
    assert (precious / "file").read_text(encoding="utf-8") == "precious"


def test_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing_folder(tmp_path / "folder") as temporary:
            names.add(temporary.name)
        with replacing(tmp_path / "file") as temporary:
            names.add(temporary.name)
    assert len(names) == 6


def test_what_a_killed_writer_left_is_removed_and_nothing_else(precious: Path, tmp_path: Path) -> None:
    code = "import os, signal, sys; from pathlib import Path; from dreamlora.files import replacing, replacing_folder\n"
    code += "with replacing_folder(Path(sys.argv[1]) / 'c' / 'step') as t, replacing(t.parent / 'x.json') as file:\n"
    code += "    (t / 'a').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    left = {file.name for file in (tmp_path / "c").iterdir()}
    assert len(left) == 2
    (tmp_path / "c" / "link").symlink_to(precious)
    for name in (
        f".mine.{os.getppid()}.00000000.tmp",
        ".other.tmp",
        ".x.999999999999999999999.tmp",
        "a.1.00000000.tmp",
    ):
        (tmp_path / "c" / name).touch()
        (precious / name).touch()
    kept = {file.name for file in (tmp_path / "c").iterdir()} - left
    remove_leftovers(tmp_path)
    assert {file.name for file in (tmp_path / "c").iterdir()} == kept
