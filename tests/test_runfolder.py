"""The run folder stays readable whenever the process is killed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder, read_jsonl, replacing, write_atomically


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
    assert "NaN" not in folder.metrics_file.read_text()


def test_a_line_cut_off_by_a_kill_is_left_out(folder: RunFolder) -> None:
    folder.log_all(1, {"train/loss": 0.5})
    whole = folder.metrics_file.read_text()
    for length in range(1, len(whole) - 1):
        folder.metrics_file.write_text(whole + whole[:length])
        assert [row["step"] for row in folder.metrics()] == [1]


def test_a_missing_file_has_no_rows(folder: RunFolder) -> None:
    assert folder.metrics() == [] and list(read_jsonl(folder.samples_file)) == []


def test_later_steps_are_forgotten_before_a_resume(folder: RunFolder) -> None:
    folder.samples.mkdir()
    for step in (0, 50, 100):
        folder.log_all(step, {"train/loss": 0.5})
        folder.sample_dir(step).mkdir()
        with folder.samples_file.open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    folder.forget_after(50)
    assert [row["step"] for row in folder.metrics()] == [0, 50]
    assert [row["step"] for row in read_jsonl(folder.samples_file)] == [0, 50]
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


def test_clearing_leaves_what_is_not_the_runs(folder: RunFolder) -> None:
    (folder.path / "notes.txt").write_text("mine")
    folder.config_file.write_text("rank: 4")
    folder.sample_dir(0).mkdir(parents=True)
    assert folder.holds_run()
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]
    assert not folder.holds_run()


def test_a_failed_write_leaves_the_old_file_and_no_rest(folder: RunFolder) -> None:
    write_atomically(folder.config_file, "old")
    with pytest.raises(RuntimeError), replacing(folder.config_file) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert folder.config_file.read_text() == "old"
    assert list(folder.path.iterdir()) == [folder.config_file]
