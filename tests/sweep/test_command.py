"""The whole command: what is run in which order, what a second call still has to do, what is written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamlora import figures
from dreamlora.compare.records import read_record
from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from dreamlora.sweep import command
from dreamlora.sweep.plan import Job
from dreamlora.sweep.pool import Ended
from dreamlora.sweep.worker import make_run as train_run
from dreamlora.sweep.worker import write_outcome
from tests.compare.synthetic import Curve, make_run

CURVES = {"adamw": Curve(2e-3, 0.46), "scaled_adamw": Curve(6.3e-3, 0.445)}


class FakePool:
    """Makes synthetic runs at once. ``made`` lists the jobs; ``stop_after`` plays Ctrl-C, ``broken`` methods fail."""

    made: list[Job]
    curves: dict[str, Curve]
    stop_after: int
    broken: tuple[str, ...]

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, jobs: Sequence[Job], on_end: Callable[[Ended], None]) -> None:
        for job in jobs:
            if len(self.made) == self.stop_after:
                raise KeyboardInterrupt
            self.made.append(job)
            folder = make_run(job.folder.parents[3], job.method, float(job.rate), job.seed, self.curves[job.method])
            assert folder.path == job.folder
            status = "failed" if job.method in self.broken else "finished"
            write_outcome(folder, job.method, status, "it broke" if status == "failed" else "")
            on_end(Ended(job, status, "it broke", 1.0))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakePool]:
    FakePool.made, FakePool.curves, FakePool.stop_after, FakePool.broken = [], dict(CURVES), -1, ()
    monkeypatch.setattr(command, "Pool", FakePool)
    return FakePool


@pytest.fixture
def compare(fake: type[FakePool], tmp_path: Path) -> Callable[..., Any]:
    """Call the command; the runs it made, and its compare.json."""

    def call(*argv: str) -> tuple[list[Job], Any]:
        fake.made = []
        command.main(["--optimizers", "adamw", "scaled_adamw", "--output_dir", str(tmp_path / "out"), *argv])
        return fake.made, json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))

    return call


def test_tuning_comes_first_then_fresh_seeds_at_the_best_rates(compare: Any) -> None:
    made, found = compare()
    tuning, headline = made[:42], made[42:]
    assert {job.seed for job in tuning} == {0, 1, 2} and len({(job.method, float(job.rate)) for job in tuning}) == 14
    assert [job.seed for job in tuning] == sorted(job.seed for job in tuning)
    assert {(job.method, float(job.rate)) for job in headline} == {("adamw", 2e-3), ("scaled_adamw", 6.32e-3)}
    assert sorted(job.seed for job in headline) == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert found["fresh_seeds"] and found["complete"]
    assert found["methods"][1]["delta"]["word"] == "better"
    assert found["command"].startswith("dreamlora compare --optimizers adamw scaled_adamw --output_dir")


def test_the_grid_grows_where_the_best_lies_at_its_edge(compare: Any, fake: type[FakePool]) -> None:
    fake.curves["adamw"] = Curve(0.2)
    made, found = compare()
    rates = sorted({float(job.rate) for job in made if job.method == "adamw"})
    assert len(rates) == 9 and rates[-2:] == [0.2, 0.632]
    adamw = found["methods"][0]
    assert adamw["best_lr"] == 0.2 and adamw["at_grid_edge"] is None
    assert [rate["added"] for rate in adamw["rates"]] == [False] * 7 + [True] * 2
    assert len({float(job.rate) for job in made if job.method == "scaled_adamw"}) == 7


def test_the_grid_does_not_grow_for_ever(compare: Any, fake: type[FakePool]) -> None:
    fake.curves["adamw"] = Curve(20.0, bend=0.001)
    _, found = compare()
    assert len(found["methods"][0]["rates"]) == 11
    assert "LR grid edge (adamw)" in found["methods"][1]["delta"]["verdict"]


def test_given_rates_are_left_as_they_are(compare: Any) -> None:
    made, found = compare("--learning_rates", "1e-4", "1e-3", "--headline_seeds", "0")
    assert {float(job.rate) for job in made} == {1e-4, 1e-3} and len(made) == 12
    assert not found["fresh_seeds"] and found["methods"][0]["at_grid_edge"] == "high"


def test_a_second_call_makes_nothing_again(compare: Any) -> None:
    _, first = compare("--quick")
    made, second = compare("--quick")
    assert made == [] and first == second


def test_more_seeds_make_only_what_is_missing(compare: Any) -> None:
    compare("--quick")
    made, _ = compare("--quick", "--headline_seeds", "5")
    assert sorted(job.seed for job in made) == [4, 4, 5, 5]


def test_a_stopped_comparison_goes_on(compare: Any, fake: type[FakePool]) -> None:
    fake.stop_after = 20
    with pytest.raises(KeyboardInterrupt):
        compare()
    first = [job.folder for job in fake.made]
    fake.stop_after = -1
    made, found = compare()
    assert len(first) == 20 and len(made) == 32 and not {job.folder for job in made} & set(first)
    assert found["complete"]


def test_what_was_compared_before_the_stop_is_there(compare: Any, fake: type[FakePool], tmp_path: Path) -> None:
    fake.stop_after = 46
    with pytest.raises(KeyboardInterrupt):
        compare()
    found = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert not found["complete"] and found["sentence"].startswith("Not complete yet.")


def test_failed_runs_are_told_and_tried_again(compare: Any, fake: type[FakePool]) -> None:
    fake.broken = ("scaled_adamw",)
    _, found = compare("--quick")
    assert not found["complete"] and {run["status"] for run in found["runs"]} == {"finished", "failed"}
    assert found["methods"][1]["delta"]["word"] == "worse" and found["methods"][1]["n_diverged"] == 3
    assert any("3 of 3 runs failed" in text and "it broke" in text for text in found["warnings"])
    fake.broken = ()
    made, found = compare("--quick")
    assert {job.method for job in made} == {"scaled_adamw"} and len(found["methods"]) == 2


def test_if_every_run_fails_the_first_reason_is_told(compare: Any, fake: type[FakePool]) -> None:
    fake.broken = ("adamw", "scaled_adamw")
    with pytest.raises(UserError, match="no run could be made; the first one ended with: it broke"):
        compare("--quick")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("scaled_adamw+adapter=loha", "--optimizer scaled_adamw works on pairs of factors"),
        ("adamw+adapter=dora+init=pissa", "--init pissa starts away from zero, which --adapter dora cannot"),
        ("schedulefree_adamw+ema_decay=0.9", "--ema_decay: --optimizer schedulefree_adamw keeps an average of its own"),
    ],
)
def test_a_method_that_cannot_train_is_refused_before_any_run(
    method: str, words: str, compare: Any, fake: type[FakePool], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--optimizers {re.escape(method)}: {words}"):
        compare("--optimizers", "adamw", method)
    assert not fake.made and not (tmp_path / "out").exists()


def test_weights_that_lack_their_package_are_refused_before_any_run(
    compare: Any, fake: type[FakePool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    for flag in ("base_precision", "text_encoder_precision"):
        with pytest.raises(UserError, match=rf'--optimizers adamw\+{flag}=nf4: --{flag} nf4: .*pip install "dreamlora'):
            compare("--optimizers", "adamw", f"adamw+{flag}=nf4")
    assert not fake.made and not (tmp_path / "out").exists()


def test_two_calls_at_once_are_refused(compare: Any, tmp_path: Path) -> None:
    holder = RunFolder(tmp_path / "out")
    holder.lock()
    with pytest.raises(UserError, match="another process"):
        compare("--quick")
    holder.release()


def test_existing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Single run folders and folders of them."""
    one = make_run(tmp_path / "a", "adamw", 2e-3, 0).path
    for seed in (0, 1, 2):
        make_run(tmp_path / "b", "sgd", 2e-3, seed, Curve(best=0.5))
    more = [make_run(tmp_path / "c", "adamw", 2e-3, seed).path for seed in (1, 2)]
    out = tmp_path / "out"
    command.main(["--runs", str(one), str(tmp_path / "b"), *map(str, more), "--output_dir", str(out)])
    found = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert [method["n_runs"] for method in found["methods"]] == [3, 3]
    assert found["methods"][1]["delta"]["word"] == "worse"
    assert "sgd" in capsys.readouterr().out
    with pytest.raises(UserError, match="--runs: there is no run in"):
        command.main(["--runs", str(tmp_path / "nothing")])


# Real training


@pytest.fixture
def flags(sd_folder: Path, tmp_path: Path) -> list[str]:
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(photos / f"{number}.png")
    text = (
        f"--pretrained_model_name_or_path {sd_folder} --instance_data_dir {photos} --resolution 16 --rank 2 "
        f"--eval_steps 1 --num_inference_steps 2 --latents_cache_dir {tmp_path / 'cache'}"
    )
    return [*text.split(), "--instance_prompt", "a photo of sks dog"]


class TrainingPool(FakePool):
    """Trains, in this process."""

    def run(self, jobs: Sequence[Job], on_end: Callable[[Ended], None]) -> None:
        for job in jobs:
            on_end(Ended(job, **train_run(job.program, list(job.argv), job.folder, job.method), seconds=1.0))


def test_real_runs_from_flags_to_compare_json(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rates, one of them far too high; one seed, one fresh seed."""
    monkeypatch.setattr(command, "Pool", TrainingPool)
    monkeypatch.setattr(sys, "argv", sys.argv)
    out = tmp_path / "out"
    argv = ["--optimizers", "adamw", "--learning_rates", "1e-3", "1e30", "--seeds", "0", "--headline_seeds", "1"]
    command.main([*argv, "--max_train_steps", "2", "--output_dir", str(out), *flags])
    found = json.loads((out / "compare.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    status = {(run["lr"], run["seed"]): run["status"] for run in found["runs"]}
    assert status == {(1e-3, 0): "finished", (1e30, 0): "diverged", (1e-3, 1): "finished"}
    assert found["methods"][0]["samples"]["steps"] == [0, 1, 2]
    tuned = RunFolder(out / "runs" / "adamw" / "lr0.001" / "seed0")
    assert tuned.holds_run() and not tuned.samples.exists() and not tuned.checkpoint_steps()
    assert "--optimizer adamw" in found["runs"][0]["command"] and found["methods"][0]["rates"][0]["dw_norm"]["n"] == 1
    record = read_record(tuned.path, "tuned")
    told = (
        f"{figures.loss(record.losses[-1])} ({figures.change(record.losses[-1], record.base)} against the base model)"
    )
    assert told in "".join(capsys.readouterr()), "as reports and evaluate say it"


def test_a_comparison_on_captioned_images(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Pool", TrainingPool)
    monkeypatch.setattr(sys, "argv", sys.argv)
    photos = tmp_path / "photos"
    for file in photos.glob("*.png"):
        file.with_suffix(".txt").write_text(f"picture {file.stem}", encoding="utf-8")
    captioned = [*flags[: flags.index("--instance_prompt")], "--sample_steps", "0", "--train_batch_size", "2"]
    captioned[captioned.index("--instance_data_dir")] = "--train_data_dir"
    argv = ["--program", "text-to-image", "--optimizers", "adamw", "sgd", "--learning_rates", "1e-3", "--seeds", "0"]
    command.main(
        [*argv, "--headline_seeds", "0", "--max_train_steps", "1", "--output_dir", str(tmp_path / "out"), *captioned]
    )
    found = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [run["status"] for run in found["runs"]] == ["finished"] * 2 and found["task"]["data"] == "photos"
    assert all(run["command"].startswith("dreamlora text-to-image ") for run in found["runs"])


def test_processes_can_share_a_run(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run as by one process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", sys.argv)
    losses = []
    for count, pool in ((2, command.Pool), (1, TrainingPool)):
        monkeypatch.setattr(command, "Pool", pool)
        out = tmp_path / str(count)
        argv = ["--optimizers", "sgd", "--learning_rates", "0.1", "--seeds", "0", "--headline_seeds", "0"]
        argv += ["--max_train_steps", "2", "--processes_per_run", str(count), "--workers", "1", "--sample_steps", "0"]
        command.main([*argv, "--output_dir", str(out), *flags])
        folder = RunFolder(out / "runs" / "sgd" / "lr0.1" / "seed0")
        assert json.loads(folder.summary_file.read_text(encoding="utf-8"))["processes"] == count
        losses.append([row["value"] for row in folder.metrics() if row["name"] == "eval/loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][-1] != losses[0][0]


def test_unfinished_runs_are_resumed_or_begun_anew(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    kept = [*flags, "--optimizer", "adamw", "--sample_steps", "0"]
    for name, every in (("with", "1"), ("without", "0")):
        folder = RunFolder(tmp_path / name)
        short = [*kept, "--max_train_steps", "2", "--checkpointing_steps", every]
        assert train_run("dreambooth", short, folder.path, "adamw")["status"] == "finished"
        folder.outcome_file.unlink()  # as if it had been killed after two steps
        longer = [*kept, "--max_train_steps", "3", "--checkpointing_steps", every]
        assert train_run("dreambooth", longer, folder.path, "adamw") == {"status": "finished", "message": ""}
        steps = [row["step"] for row in folder.metrics() if row["name"] == "train/loss"]
        assert steps == [1, 2, 3]
    assert "resume" not in json.loads((tmp_path / "with" / "summary.json").read_text(encoding="utf-8"))["command"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_signal_leaves_nothing_running_and_no_step_is_lost(name: str, flags: list[str], tmp_path: Path) -> None:
    """After SIGKILL the workers see that nobody waits for them any more."""
    out = tmp_path / "out"
    words = ["compare", "--optimizers", "adamw", "--workers", "1", "--max_train_steps", "100000", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamlora", *words, "--output_dir", str(out)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(out.rglob("metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        (log,) = out.rglob("metrics.jsonl")
        while not any(row["step"] >= 3 for row in RunFolder(log.parent).metrics()) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.Signals[name])
        _, told = process.communicate(timeout=40)
    finally:
        process.kill()
    if name != "SIGKILL":
        assert process.returncode == 128 + signal.Signals[name] and "the same command goes on from here" in told
        assert "Traceback" not in told
    run = RunFolder(log.parent)
    deadline = time.monotonic() + 30
    while not run.checkpoint_steps() and time.monotonic() < deadline:
        time.sleep(0.1)
    (step,) = run.checkpoint_steps()
    rows = [row["step"] for row in run.metrics() if row["name"] == "train/loss"]
    assert rows[:step] == list(range(1, step + 1)) and rows[step:] in ([], [step + 1])  # it was being measured
    size = log.stat().st_size
    time.sleep(0.5)
    assert log.stat().st_size == size and not list(out.rglob("outcome.json"))
