"""The disk fills up at every single write of a run: one message, no rest, and what was written before can be read."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from dreamlora.__main__ import dispatch
from dreamlora.cli.parse import run as run_program
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.report import write_report
from dreamlora.runfolder import RunFolder
from dreamlora.training import state
from tests.limits import file_size_limit
from tests.training.conftest import flags_of, train_with

_VARIES = re.compile(r"[0-9a-f]*\d[0-9a-f]*|(?<=\.)[0-9a-f]{8}(?=\.tmp)|(?<=^cache/)[0-9a-f]{2}(?=/)")
STORES = ("cache", "class_images")
_watching: list[Callable[[Path], None]] = []
_installed: list[bool] = []
"""Audit hooks cannot be taken away again."""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _watching and isinstance(args[0], str | bytes | os.PathLike):
        to_write = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        _watching[-1](Path(os.fsdecode(args[0]))) if to_write else None


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[..., None]]:
    """Call a function for every file that is opened to be written."""
    if not _installed:
        sys.addaudithook(_audit)
        _installed.append(True)
    yield _watching.append
    _watching.clear()


def kind_of(file: Path, root: Path) -> str | None:
    """A file's place in a run, without numbers and hashes; None: it is not of the run."""
    return _VARIES.sub("#", file.relative_to(root).as_posix()) if file.is_relative_to(root) else None


def train(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit status, and what was said."""
    said = io.StringIO()  # the test's own capture is a file too
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", said)
        patch.setattr(sys, "stdout", said)
        status = run_program(train_with, flags)
    return status, said.getvalue()


@pytest.fixture
def everything(photos: Path, sd_folder: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The flags of a short run that writes all there is, into a folder of its own."""

    def flags(name: str) -> list[str]:
        root = tmp_path / name
        prior = ["--with_prior_preservation", "--class_prompt", "dog", "--num_class_images", "2"]
        more = "--max_train_steps 1 --eval_steps 1 --sample_steps 1 --checkpointing_steps 1 --eval_metrics clip_score "
        more += "--clip_model tiny --eval_num_images 1 --report_to tensorboard --no_parity_check"
        return [*flags_of(photos, root / "cache", sd_folder, root / "run"), *prior, *more.split()]

    return flags


def check_readable(run: RunFolder) -> None:
    """All that is there is whole."""
    assert run.damage() == []
    for step in run.checkpoint_steps():
        state.open_checkpoint(run.checkpoint_dir(step))
    for file in (run.evalset_file, run.final_evalset_file):
        assert not file.exists() or EvalSet.load(file)
    for file in (run.eval_items_file, run.final_items_file):
        assert not file.exists() or ItemLosses.load(file)
    for file in run.path.rglob("*.safetensors"):
        with safe_open(file, framework="np") as whole:
            assert list(whole.keys())


def test_every_write(
    everything: Callable[[str], list[str]],
    opened: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = pytest.importorskip("resource")
    kinds: dict[str, None] = {}
    opened(lambda file: kinds.setdefault(kind_of(file, tmp_path / "whole") or ""))
    status, said = train(everything("whole"), monkeypatch)
    assert status == 0, said
    again = re.compile(r"\.tmp/[^.]|/\.lock$")  # opened for the disk's sake alone, to lock it
    places = [kind for kind in kinds if kind and not again.search(kind)]
    assert len(places) > 20, "the writes are not seen"
    for number, place in enumerate(places):
        root = tmp_path / str(number)
        if not place.startswith(STORES):  # what comes before the run's own writes is there then
            for store in STORES:
                shutil.copytree(tmp_path / "whole" / store, root / store)

        def fill(file: Path, root: Path = root, place: str = place) -> None:
            if kind_of(file, root) == place:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        with file_size_limit(2**40):
            opened(fill)
            status, said = train(everything(str(number)), monkeypatch)
            opened(lambda file: None)
        told = [line for line in said.splitlines() if "error:" in line]
        assert status == 1 and len(told) == 1 and "Traceback" not in said, f"{place}: {said[-3000:]}"
        rests = [file for file in root.rglob("*") if ".tmp" in file.name]
        assert not rests, f"{place}: {rests}"
        check_readable(RunFolder(root / "run"))
        if number % 12 == 0:
            if RunFolder(root / "run").holds_run():
                write_report(root / "run")
            status, said = train([*everything(str(number)), "--resume_from_checkpoint", "latest"], monkeypatch)
            assert status == 0, f"{place}: {said[-3000:]}"


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A disk of 800 KiB, in memory."""
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "none", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def start(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dreamlora", "dreambooth", *words], capture_output=True, text=True)


def test_a_disk_that_is_full_indeed(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk"):
        run = RunFolder(tmp_path / "disk" / "run")
        words = [*flags, "--output_dir", str(run.path), "--checkpointing_steps", "1", "--max_train_steps", "60"]
        done = start(words)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "the disk is full. Free some space" in done.stderr.splitlines()[-1]
        assert run.checkpoint_steps() and not [file for file in run.path.rglob("*") if ".tmp" in file.name]
        for step in run.checkpoint_steps():
            state.open_checkpoint(run.checkpoint_dir(step))
        assert len(run.metrics()) > 4 and run.damage() == []
        subprocess.run(["mount", "-o", "remount,size=8m", tmp_path / "disk"], check=True)
        words += ["--resume_from_checkpoint", "latest", "--max_train_steps", str(run.checkpoint_steps()[-1] + 1)]
        status, said = train(words, monkeypatch)
        assert status == 0, said


def test_a_limit_of_the_shell_is_told_as_such(flags: list[str]) -> None:
    program = shlex.join([sys.executable, "-m", "dreamlora", "dreambooth", *flags])
    done = subprocess.run(["bash", "-c", f"ulimit -f 64; {program}"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "`ulimit -f`" in done.stderr.splitlines()[-1]


DRAWN = "{run} --trust_runs --num_images_per_prompt 1 --output_dir {out}"
COMMANDS = {
    "sample": f"sample {DRAWN} --num_inference_steps 1 --prompts dog",
    "evaluate": f"evaluate {DRAWN} --metrics clip_score --clip_model tiny",
    "report": "report {out}/run",
    "compare": "compare --runs {run} {other} --output_dir {out}",
}


@pytest.fixture(scope="module")
def two_runs(photos: Path, sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    for name, rate in (("run", "1e-4"), ("other", "1e-3")):
        more = f"--max_train_steps 1 --eval_steps 1 --learning_rate {rate} --no_parity_check --num_inference_steps 1"
        train_with([*flags_of(photos, root / "cache", sd_folder, root / name), *more.split()])
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_every_write_of_other_commands(
    command: str,
    two_runs: Path,
    opened: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = pytest.importorskip("resource")

    def call(name: str, watch: Callable[[Path], None]) -> tuple[int, str]:
        out = tmp_path / name
        monkeypatch.setenv("DREAMLORA_CACHE", str(out / "cache"))
        if command == "report":
            shutil.copytree(two_runs / "run", out / "run")
        words = COMMANDS[command].format(run=two_runs / "run", other=two_runs / "other", out=out).split()
        with file_size_limit(2**40), monkeypatch.context() as patch:
            said = io.StringIO()
            patch.setattr(sys, "stdout", said)
            patch.setattr(sys, "stderr", said)
            opened(watch)
            status = run_program(dispatch, words)
            opened(lambda file: None)
        return status, said.getvalue()

    kinds: dict[str, None] = {}
    status, said = call("whole", lambda file: kinds.setdefault(kind_of(file, tmp_path / "whole") or ""))
    assert status == 0, said
    places = [kind for kind in kinds if kind and not re.search(r"\.tmp/[^.]|/\.lock$", kind)]
    assert len(places) >= 2, places
    for number, place in enumerate(places):
        root = tmp_path / str(number)

        def fill(file: Path, root: Path = root, place: str = place) -> None:
            if kind_of(file, root) == place:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        status, said = call(str(number), fill)
        told = [line for line in said.splitlines() if "error:" in line]
        index = place.endswith("image_facts.sqlite")  # a convenience: without it files are read anew
        assert (status, len(told)) == ((0, 0) if index else (1, 1)) and "Traceback" not in said, (
            f"{place}: {said[-2000:]}"
        )
        assert not [file for file in root.rglob("*") if ".tmp" in file.name], place


def test_few_open_files_suffice(flags: list[str]) -> None:
    program = shlex.join([sys.executable, "-m", "dreamlora", "dreambooth", *flags, "--max_train_steps", "1"])
    done = subprocess.run(["bash", "-c", f"ulimit -n 64; {program}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
