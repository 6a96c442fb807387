"""A signal at any moment leaves a checkpoint, or nothing that was worth one; what goes on from there ends the same."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dreamlora import interrupts
from dreamlora.callbacks import best, evaluate, final, sample
from dreamlora.callbacks.log import LogCallback
from dreamlora.interrupts import Interrupted, deferred, heeded
from dreamlora.lora import saving
from dreamlora.run import assemble, ending
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop, state
from tests.training.conftest import flags_of, train_with
from tests.training.test_processes import ON_CPU, SCRIPT
from tests.training.test_resume import HARD, assert_equal_runs
from tests.training.test_run import same, weights

Train = Callable[..., RunFolder]
SAVED_BY_SIGNALS = [*HARD, "--checkpointing_steps", "0"]
"""No checkpoint but those of signals."""


def signal_in(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, signum: int = signal.SIGTERM) -> None:
    """Send this process a signal when the function is called for this time (from 1), and once it is done."""
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def wrapper(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return original(*args, **options)

    patch.setattr(owner, name, wrapper)


@pytest.fixture(scope="module")
def whole(photos: Path, cache: Path, sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that nobody stops."""
    place = tmp_path_factory.mktemp("whole") / "run"
    return train_with([*flags_of(photos, cache, sd_folder, place), *SAVED_BY_SIGNALS])


def resumed(train: Train, *flags: str) -> RunFolder:
    """What goes on from the latest checkpoint, without what nobody looks at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "write_report", lambda path: None)
        return train(*flags, "--no_parity_check", "--resume_from_checkpoint", "latest")


MOMENTS: dict[str, tuple[Any, str, int, int | None]] = {
    "before the model is loaded": (assemble, "_build", 1, None),
    "the base model is measured": (evaluate, "evaluate_loss", 1, None),
    "the base model is drawn": (sample, "draw", 1, None),
    "the first step": (loop, "micro_batch_loss", 1, 1),
    "a step": (loop, "micro_batch_loss", 2, 2),
    "a step on which much follows": (loop, "micro_batch_loss", 3, 2),
    "the log of such a step": (LogCallback, "on_step", 3, 2),
    "a measurement": (evaluate, "evaluate_loss", 4, 2),
    "its writing": (evaluate.ItemLosses, "save", 3, 2),
    "a drawing": (sample, "draw", 2, 2),
    "the grid": (sample, "grid_of_run", 2, 2),
    "the choice of the best": (best, "select", 2, 2),
    "its end": (best.BestCallback, "_forget", 1, 2),
    "the step after": (loop, "micro_batch_loss", 4, 4),
    "the last step": (loop, "micro_batch_loss", 6, 5),
    "the last measurement": (final.FinalCallback, "on_end", 1, 6),
    "the last drawing": (sample, "draw", 3, 5),
    "the check of the LoRA": (ending.parity, "check", 1, None),
    "the report": (ending, "write_report", 1, None),
}
"""Where a signal comes, and the step of the checkpoint; None: there is none."""


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_run_that_a_signal_stopped_goes_on_as_if_it_had_not(
    moment: tuple[Any, str, int, int | None], whole: RunFolder, train: Train, tmp_path: Path
) -> None:
    owner, name, call, saved = moment
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
        signal_in(patch, owner, name, call)
        train(*SAVED_BY_SIGNALS)
    assert RunFolder(tmp_path / "run").checkpoint_steps() == ([saved] if saved else [])
    assert not list((tmp_path / "run").rglob("*.tmp*"))
    assert_equal_runs(whole, resumed(train, *SAVED_BY_SIGNALS))


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(train: Train, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
        signal_in(patch, state.torch, "save", 2)  # the first is a copy in memory, before the step that measures
        train("--checkpointing_steps", "3")
    assert RunFolder(tmp_path / "run").checkpoint_steps() == [3]


@pytest.mark.parametrize("step, saved", [(2, []), (3, [2])], ids=["a step", "one on which much follows"])
def test_a_second_ctrl_c_amid_an_update_saves_no_half_of_it(
    step: int, saved: list[int], whole: RunFolder, train: Train, tmp_path: Path
) -> None:
    update, calls = loop._update, []

    def impatient(*args: Any) -> None:
        update(*args)
        calls.append(step)
        if len(calls) == step:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
        patch.setattr(interrupts, "BURST_S", 0)
        patch.setattr(loop, "_update", impatient)
        train(*SAVED_BY_SIGNALS)
    assert RunFolder(tmp_path / "run").checkpoint_steps() == saved
    assert_equal_runs(whole, resumed(train, *SAVED_BY_SIGNALS))


def test_what_fails_as_another_process_has_ended_by_the_signal_costs_no_step(train: Train, tmp_path: Path) -> None:
    gather, calls = sample.gather_lists, []

    def collective(rows: list[Any]) -> list[Any]:
        calls.append(rows)
        if len(calls) == 1:  # the base model's
            return gather(rows)
        with deferred():  # in the library's code nothing is raised
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("Connection closed by peer")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
        patch.setattr(sample, "gather_lists", collective)
        train("--checkpointing_steps", "0", "--eval_steps", "0")
    assert RunFolder(tmp_path / "run").checkpoint_steps() == [2]


@pytest.mark.parametrize("average", ["--optimizer schedulefree_adamw", "--ema_decay 0.5"])
def test_averages_of_the_path_survive_a_signal(average: str, train: Train, tmp_path: Path) -> None:
    """Their parameters are exchanged at every step; the first's round there."""
    flags = [*average.split(), "--checkpointing_steps", "0", "--max_train_steps", "4", "--sample_steps", "3"]
    flags += ["--eval_steps", "0"]
    whole = train(*flags, "--output_dir", str(tmp_path / "whole" / "run"))
    for step in (2, 3):
        place = str(tmp_path / str(step) / "run")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
            signal_in(patch, loop, "micro_batch_loss", step)
            train(*flags, "--output_dir", place)
        assert same(weights(whole), weights(resumed(train, *flags, "--output_dir", place)))


def test_a_signal_while_the_lora_is_written_leaves_it_whole(train: Train, whole: RunFolder, tmp_path: Path) -> None:
    """Without checkpoints nothing else would be left of the training."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
        signal_in(patch, ending.state, "save_lora", 3)  # two are candidates for the best checkpoint
        train(*SAVED_BY_SIGNALS)
    assert same(weights(RunFolder(tmp_path / "run")), weights(whole))


def test_a_check_that_a_signal_stopped_is_made_where_a_checkpoint_is_left(train: Train) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
        signal_in(patch, ending.parity, "check", 1)
        train("--max_train_steps", "2")
    run = train("--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert run.summary()["parity"]["psnr_db"] > 40


def test_where_the_trained_lora_lies_is_told(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
        signal_in(patch, ending.parity, "check", 1)
        train("--max_train_steps", "1", "--checkpointing_steps", "0", "--eval_steps", "0")
    assert "The LoRA is trained and lies in " in caplog.text and "Nothing was trained" not in caplog.text


def test_a_write_that_a_signal_stops_leaves_no_rest(train: Train, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heeded():
        signal_in(patch, saving, "serialised", 1)
        train()
    assert not [file for file in (tmp_path / "run").rglob("*") if ".tmp" in file.name]


# The command, as people and schedulers stop it.


@pytest.fixture
def started(flags: list[str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a training that would take for ever; it has made a step when this returns."""
    processes = []

    def start(*launcher: str, steps: int = 100000, **options: Any) -> subprocess.Popen[str]:
        words = [*(launcher or ("-m", "dreamlora", "dreambooth")), *flags, "--max_train_steps", str(steps)]
        words += ["--eval_steps", "0", "--sample_steps", "0", "--checkpointing_steps", "0"]
        process = subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | ON_CPU,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            **options,
        )
        processes.append(process)
        deadline = time.monotonic() + 100
        while not any(row["name"] == "train/loss" for row in RunFolder(tmp_path / "run").metrics()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
            time.sleep(0.1)
        return process

    yield start
    for process in processes:
        process.terminate()
        process.communicate()


def test_the_command_says_what_goes_on(started: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = started()
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGUSR1 and "Traceback" not in told
    run = RunFolder(tmp_path / "run")
    (step,) = run.checkpoint_steps()
    assert f"The checkpoint of step {step} lies in {run.checkpoint_dir(step)}" in told
    command = shlex.split(next(line for line in told.splitlines() if line.startswith("    dreamlora")))
    assert command[:2] == ["dreamlora", "dreambooth"] and command[-2:] == ["--resume_from_checkpoint", "latest"]
    train_with([*command[2:], "--max_train_steps", str(step + 1), "--no_parity_check"])
    assert run.checkpoint_steps() == [step] and run.lora_file.exists()


def test_a_signal_before_the_training_ends_at_once(flags: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamlora", "dreambooth", *flags], stderr=subprocess.PIPE, encoding="utf-8"
    )
    time.sleep(1.5)  # torch is imported
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in told and "stopped (Ctrl-C)" in told


@pytest.mark.parametrize("streams", [("stderr",), ("stdout",), ("stderr", "stdout")], ids="+".join)
def test_a_reader_who_has_gone_ends_the_printing_alone(
    streams: tuple[str, ...], started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """`dreamlora ... 2>&1 | head`."""
    process = started("-m", "dreamlora", "dreambooth", steps=40)
    for name in streams:
        getattr(process, name).close()
        setattr(process, name, None)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    run = RunFolder(tmp_path / "run")
    assert run.lora_file.exists() and run.report_html.exists() and run.metrics()[-1]["step"] == 40


# Two processes.


def launcher_of_two() -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    return [*words.split(), "--mixed_precision", "no", "--dynamo_backend", "no", str(SCRIPT)]


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("needs /proc")
    return [int(word) for word in found.read_text(encoding="utf-8").split()]


@pytest.mark.parametrize("who", ["launcher", "second"])
def test_processes_agree_on_where_they_stop(
    who: str, started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    launcher = started(*launcher_of_two())
    _, second = sorted(children_of(launcher.pid))
    os.kill({"launcher": launcher.pid, "second": second}[who], signal.SIGTERM)
    _, told = launcher.communicate(timeout=60)
    (step,) = RunFolder(tmp_path / "run").checkpoint_steps()
    rows = [row["step"] for row in RunFolder(tmp_path / "run").metrics() if row["name"] == "train/loss"]
    assert rows == list(range(1, step + 1))
    assert f"The checkpoint of step {step} lies in" in told
    own = [line for line in told.splitlines() if line.lstrip().startswith('File "') and "/dreamlora/" in line]
    assert own == []  # the launcher has tracebacks of its own
