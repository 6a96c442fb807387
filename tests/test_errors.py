"""What systems and libraries say becomes a sentence with the file and what to do; what may be a bug does not."""

from __future__ import annotations

import errno
import os
import pickle
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dreamlora.errors import WriteError, explained, numbers, os_error
from dreamlora.files import replacing
from tests.limits import file_size_limit

MENDABLE = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOTDIR EISDIR ENAMETOOLONG EIO ESTALE EMFILE ENFILE ENOTEMPTY EBUSY"


@pytest.mark.parametrize("name", MENDABLE.split())
def test_what_the_system_refuses_is_one_sentence(name: str) -> None:
    (number,) = numbers(name)
    error = OSError(number, os.strerror(number), "outputs/run/metrics.jsonl")
    told = explained(error)
    assert told is not None and told.startswith("outputs/run/metrics.jsonl: ") and told.count(". ") >= 2
    assert str(WriteError.of(Path("x"), error)).startswith("cannot write x: ")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone", "x"), ValueError("x"), OSError("x"), KeyError()]
)
def test_what_may_be_a_bug_is_not_explained(error: Exception) -> None:
    assert explained(error) is None


def test_an_error_that_came_while_another_was_handled_is_not_taken_for_it() -> None:
    try:
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "x")
        except PermissionError:
            raise KeyError("a bug")  # noqa: B904 - that is the point
    except KeyError as error:
        assert explained(error) is None


@pytest.mark.parametrize("text, number", [("database or disk is full", errno.ENOSPC), ("disk I/O error", errno.EIO)])
def test_sqlite_says_it_in_words(text: str, number: int) -> None:
    found = os_error(sqlite3.OperationalError(text))
    assert found is not None and found.errno == number
    assert os_error(sqlite3.OperationalError("no such table: x")) is None


def test_no_place_for_temporary_files_is_explained() -> None:
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    told = explained(error)
    assert told is not None and "TMPDIR" in told


WRITERS = {
    "safetensors": lambda file: save_file({"a": torch.zeros(4096)}, file),
    "torch, to a file": lambda file: torch.save({"a": torch.zeros(4096)}, file.open("wb")),
    "pillow": lambda file: __import__("PIL.Image").Image.effect_noise((256, 256), 90).save(file),
    "pillow's webp": lambda file: __import__("PIL.Image").Image.effect_noise((256, 256), 90).save(file, "WEBP"),
    "numpy": lambda file: np.save(file.open("wb"), np.zeros(4096)),
    "text": lambda file: file.write_text("x" * 9999, encoding="utf-8"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_library_that_writes_is_understood(write: object, tmp_path: Path) -> None:
    """The limit on the size of files stands for a full disk: the system refuses in the same places."""
    assert callable(write)
    with file_size_limit(2048), pytest.raises(WriteError) as error, replacing(tmp_path / "file.png") as temporary:
        write(temporary)
    assert error.value.reason == os.strerror(errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


def out_of_memory_on_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


TOO_LARGE = {
    "torch": lambda: torch.empty(10**15),
    "torch, in bytes": lambda: torch.empty(2**62, 2**62),
    "numpy": lambda: np.empty(10**15),
    "python": lambda: bytearray(2**62),
    "an index": lambda: b"x" * 10**30,
    "cuda": out_of_memory_on_cuda,
}


@pytest.mark.parametrize("make", TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_no_memory_holds_names_the_flags(make: object) -> None:
    assert callable(make)
    with pytest.raises(Exception) as error:
        make()
    told = explained(error.value)
    assert told is not None and "--train_batch_size" in told and "--gradient_checkpointing" in told and "\n" not in told


def test_processes_can_tell_each_other() -> None:
    error = WriteError.of(Path("x"), OSError(errno.ENOSPC, "No space left on device"))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.disk_full) == (str(error), "the disk is full", True)


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24485. GLHF!",
        "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:10159: Connection reset by peer",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, torch.distributed.DistNetworkError])
def test_a_process_of_the_run_that_has_gone_is_told(kind: type[RuntimeError], text: str) -> None:
    told = explained(kind(text))
    assert told is not None and told.startswith("another process of this run has ended")


@pytest.mark.skipif(os.name == "nt", reason="there a folder that is in use cannot be removed")
def test_a_working_folder_that_has_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as failed:
        Path("run").resolve()
    told = explained(failed.value)
    assert told is not None and told.startswith("the folder that this was started in is there no more")
