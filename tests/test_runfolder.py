"""The run folder stays readable whenever the process is killed."""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dreamlora.errors import UserError
from dreamlora.jsonl import append_jsonl
from dreamlora.runfolder import RunFolder

SAMPLE = {"step": 0, "prompt_index": 0, "image_index": 0, "prompt": "a dog", "seed": 42, "file": "step_000000/p00.png"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def test_values_are_logged_one_per_line(folder: RunFolder) -> None:
    folder.log_all(3, {"eval/loss": 0.25}, n=40, evalset_id="ab")
    (row,) = folder.metrics()
    assert row.pop("wall_s") >= 0
    assert row == {"v": 1, "run": "run", "step": 3, "name": "eval/loss", "value": 0.25, "n": 40, "evalset_id": "ab"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_null_so_that_any_reader_can_parse_them(folder: RunFolder, value: float) -> None:
    folder.log_all(1, {"train/loss": value})
    assert folder.metrics()[0]["value"] is None
    assert "NaN" not in folder.metrics_file.read_text(encoding="utf-8")


def test_a_line_cut_off_by_a_kill_is_left_out(folder: RunFolder) -> None:
    folder.log_all(1, {"train/loss": 0.5})
    whole = folder.metrics_file.read_text(encoding="utf-8")
    for length in range(1, len(whole) - 1):
        folder.metrics_file.write_text(whole + whole[:length], encoding="utf-8")
        assert [row["step"] for row in folder.metrics()] == [1]
        assert folder.damage() == []


def test_a_missing_file_has_no_rows(folder: RunFolder) -> None:
    assert folder.metrics() == [] and folder.sample_rows() == []


DAMAGED = {
    "cut": b'{"v": 1, "step": 2, "na',
    "no object": b"[1, 2]",
    "no JSON": b"hello",
    "zeros of a power cut": b"\0" * 40,
    "zeros before a row": b'\0\0{"step": 2, "name": "train/loss", "value": 1.0}',
    "no UTF-8": b'{"step": 2, "name": "train/loss\xff", "value": 1.0}',
    "another program's row": b'{"epoch": 2, "loss": 1.0}',
    "no step": b'{"name": "train/loss", "value": 1.0}',
    "a step that is no number": b'{"step": "two", "name": "train/loss", "value": 1.0}',
    "no name": b'{"step": 2, "value": 1.0}',
    "a value that is no number": b'{"step": 2, "name": "train/loss", "value": "low"}',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_hides_no_other_and_is_told_once(
    line: bytes, folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        folder.log_all(step, {"train/loss": 0.5})
    first, _, third = folder.metrics_file.read_bytes().splitlines()
    folder.metrics_file.write_bytes(b"\n".join([first, line, third, b""]))
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in folder.metrics()] == [1, 3]
        folder.metrics()
    text = f"{folder.metrics_file}: line 2 cannot be read and is left out"
    assert caplog.messages == [text] and folder.damage() == [text]


def test_many_damaged_lines_are_counted(folder: RunFolder) -> None:
    folder.metrics_file.write_text("x\n" * 12, encoding="utf-8")
    (text,) = folder.damage()
    assert text.endswith("lines 1, 2, 3, 4, 5 and 7 more cannot be read and are left out")


@pytest.mark.parametrize("missing", SAMPLE)
def test_rows_of_samples_have_all_that_their_readers_need(missing: str, folder: RunFolder) -> None:
    folder.samples.mkdir()
    foreign = {name: value for name, value in SAMPLE.items() if name != missing}
    append_jsonl(folder.samples_file, [foreign, SAMPLE])
    assert folder.sample_rows() == [SAMPLE]
    assert folder.damage() == [f"{folder.samples_file}: line 1 cannot be read and is left out"]


def test_a_row_is_appended_on_a_line_of_its_own(folder: RunFolder) -> None:
    """Also behind half a line, which a kill has left."""
    folder.log_all(1, {"train/loss": 0.5})
    whole = folder.metrics_file.read_bytes()
    for rest in (whole[:20], b"\0" * 5, whole[:-1]):
        folder.metrics_file.write_bytes(whole + rest)
        folder.log_all(2, {"train/loss": 0.4})
        assert [row["step"] for row in folder.metrics()] == [1, *([1] if rest == whole[:-1] else []), 2]


def test_numbers_beside_a_value_may_be_infinite_too(folder: RunFolder) -> None:
    folder.log_all(1, {"img/clip_t_change": 0.1}, n=1, se=math.nan)
    (row,) = folder.metrics()
    assert row["se"] is None and row["value"] == 0.1


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999"])
def test_values_of_other_writers_that_are_not_finite_are_none_as_well(text: str, folder: RunFolder) -> None:
    folder.metrics_file.write_text(f'{{"step": 1, "name": "train/loss", "value": {text}}}\n', encoding="utf-8")
    assert folder.metrics()[0]["value"] is None


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\0\0\0", b'{"a": "\xff"}'])
def test_a_damaged_json_file_is_named(content: bytes, folder: RunFolder) -> None:
    folder.summary_file.write_bytes(content)
    assert folder.summary() == {} and folder.outcome() == {}
    assert [text.startswith(f"cannot read {folder.summary_file}: ") for text in folder.damage()] == [True]


def test_a_damaged_outcome_is_none_and_that_is_told(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.outcome_file.write_text("{", encoding="utf-8")
    assert folder.outcome() == {}
    assert "outcome.json" in caplog.text


def test_later_steps_are_forgotten_before_a_resume(folder: RunFolder) -> None:
    folder.samples.mkdir()
    for step in (0, 50, 100):
        folder.log_all(step, {"train/loss": 0.5})
        folder.sample_dir(step).mkdir()
        append_jsonl(folder.samples_file, [{**SAMPLE, "step": step}])
    folder.samples_file.write_text("half a line\n" + folder.samples_file.read_text(encoding="utf-8"))
    folder.forget_after(50)
    assert [row["step"] for row in folder.metrics()] == [0, 50]
    assert [row["step"] for row in folder.sample_rows()] == [0, 50]
    assert sorted(path.name for path in folder.samples.glob("step_*")) == ["step_000000", "step_000050"]


def test_only_complete_checkpoints_are_listed(folder: RunFolder) -> None:
    for name in ("step-000100", "step-000050", ".step-000150.tmp", "step-000200.tmp", "other"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.checkpoint_steps() == [50, 100]
    assert folder.checkpoint_dir(100).name == "step-000100"


def test_two_processes_cannot_train_into_one_folder(folder: RunFolder) -> None:
    folder.lock()
    other = RunFolder(folder.path)
    with pytest.raises(UserError, match="another process is training into"):
        other.lock()


def fail_to_lock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_another_process_is_named_only_where_there_is_one(
    number: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_lock(monkeypatch, number)
    with pytest.raises(UserError, match="another process is training into"):
        folder.lock()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL])
def test_where_there_are_no_locks_training_goes_on_with_a_warning(
    number: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_to_lock(monkeypatch, number)
    folder.lock()
    (text,) = caplog.messages
    assert str(folder.path) in text and "nothing will keep a second process from training into it" in text
    folder.release()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_other_reasons_not_to_lock_are_told_as_they_are(
    number: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_lock(monkeypatch, number)
    with pytest.raises(UserError, match=f"cannot write {folder.path}: {os.strerror(number)}.*--output_dir"):
        folder.lock()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize(("place", "method"), [(Path, "mkdir"), (os, "open")])
def test_a_folder_that_cannot_be_written_to_is_named(
    place: Any, method: str, number: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(place, method, refuse)
        with pytest.raises(UserError, match=f"cannot write {folder.path}: {os.strerror(number)}.*--output_dir"):
            folder.lock()


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write .*run: File exists"):
        RunFolder(tmp_path / "run").lock()


def test_a_link_in_the_locks_place_is_not_followed(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious", encoding="utf-8")
    (folder.path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"cannot write .*run: "):
        folder.lock()
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "precious"


def test_what_lies_in_the_locks_place_stays(folder: RunFolder) -> None:
    (folder.path / ".lock").write_text("mine", encoding="utf-8")
    folder.lock()
    folder.release()
    assert (folder.path / ".lock").read_text(encoding="utf-8") == "mine"


def test_the_lock_ends_with_its_process(folder: RunFolder) -> None:
    """Also of one that was killed; and a process that lives has it."""
    code = "import sys, time; from pathlib import Path; from dreamlora.runfolder import RunFolder\n"
    code += "folder = RunFolder(Path(sys.argv[1])); folder.lock(); print('locked', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="another process is training into"):
            folder.lock()
    finally:
        holder.kill()
        holder.communicate()
    folder.lock()
    folder.release()


def test_remains_are_of_a_run_that_did_not_begin(folder: RunFolder) -> None:
    assert not folder.holds_remains()
    folder.outline_file.write_text('{"place": "of somebody else"}', encoding="utf-8")
    assert not folder.holds_remains()
    folder.outline_file.write_text('{"model": "tiny"}', encoding="utf-8")
    assert folder.holds_remains()
    for made in (folder.config_file, folder.lora_file, folder.checkpoint_dir(4)):
        made.mkdir(parents=True)
        assert not folder.holds_remains(), "it can be resumed, or is to be kept"
        made.rmdir()
    assert folder.holds_remains()


def test_a_kill_leaves_what_tells_that_there_is_something_to_clear(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []
    monkeypatch.setattr("dreamlora.runfolder.remove", removed.append)
    folder.clear()
    assert removed[-2:] == [folder.config_file, folder.outline_file] and len(removed) == len(set(removed))
    assert set(removed) == set(folder.entries())


def test_clearing_leaves_what_is_not_the_runs(folder: RunFolder) -> None:
    (folder.path / "notes.txt").write_text("mine", encoding="utf-8")
    folder.config_file.write_text("rank: 4", encoding="utf-8")
    folder.sample_dir(0).mkdir(parents=True)
    assert folder.holds_run()
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]
    assert not folder.holds_run()


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"step": ', b'{"step": "x"}', b"\xff"])
def test_a_damaged_choice_of_the_best_counts_as_none(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It can be made anew, and nothing else depends on it."""
    folder = RunFolder(tmp_path)
    folder.best.mkdir()
    folder.selection_file.write_bytes(content)
    assert folder.selection() == {} and f"cannot read {folder.selection_file}" in caplog.text


def test_who_claims_the_folder_removes_what_a_killed_run_left(folder: RunFolder) -> None:
    code = "import os, signal, sys; from pathlib import Path; from dreamlora.files import replacing_folder\n"
    code += "with replacing_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(folder.checkpoint_dir(100))], check=False)
    assert len(list(folder.checkpoints.iterdir())) == 1
    folder.lock()
    folder.release()
    assert list(folder.checkpoints.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["step-²", "step-٠٠٠١٠٠", "step-1", "step-0001000", "step-" + "9" * 200, "step-00010a"]
)
def test_folders_with_other_names_are_no_checkpoints(name: str, folder: RunFolder) -> None:
    for place in (folder.checkpoints, folder.candidates):
        (place / name).mkdir(parents=True)
    assert folder.checkpoint_steps() == [] == folder.candidate_steps()


def test_rows_are_not_written_through_a_link(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious", encoding="utf-8")
    folder.metrics_file.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .*A link lies there"):
        folder.log_all(1, {"train/loss": 0.5})
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "precious"
