"""Temporary folders are private, go with their process, and what a kill leaves goes with the next one."""

from __future__ import annotations

import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dreamlora.scratch import PREFIX, Scratch

CODE = """
import sys, time
from pathlib import Path
from dreamlora.data.catalog import Catalog
from dreamlora.data.folder import FolderPlace
from dreamlora.cli.parse import run
def main(argv):
    catalog = Catalog(FolderPlace(Path("photos")))
    catalog.add("a.png", ["a secret caption"])
    print("ready", flush=True)
    time.sleep(60)
sys.exit(run(main, []))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "tmp"


def ended(signum: int) -> int:
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signum)
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_captions_go_with_a_signal(signum: int, place: Path) -> None:
    assert ended(signum) == 128 + signum
    assert list(place.iterdir()) == []


def test_what_a_kill_leaves_goes_with_the_next_one(place: Path) -> None:
    assert ended(signal.SIGKILL) == -signal.SIGKILL
    (left,) = place.iterdir()
    assert (left / "rows.sqlite").exists()
    hour_ago = time.time() - 3600
    os.utime(left, (hour_ago, hour_ago))
    with Scratch() as own:
        assert list(place.iterdir()) == [own]


def test_nothing_else_goes(place: Path, tmp_path: Path) -> None:
    """What lives, what is not a scratch folder, what others own, links."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".lock").touch()
    (place / f"{PREFIX}link").symlink_to(tmp_path / "mine")
    for name, mode in (("open", 0o755), ("unlocked", 0o700)):
        (place / f"{PREFIX}{name}").mkdir(mode=mode)
    (place / f"{PREFIX}open" / ".lock").touch()
    with Scratch() as first:
        before = set(place.iterdir())
        for folder in before:
            os.utime(folder, (0, 0), follow_symlinks=False)
        with Scratch() as second:
            assert set(place.iterdir()) == {*before, second}
        assert set(place.iterdir()) == before and first in before
    assert (tmp_path / "mine" / ".lock").exists()


def test_they_are_private_whatever_the_umask(place: Path) -> None:
    before = os.umask(0)
    try:
        with Scratch() as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_other_processes_do_not_take_it_away(place: Path) -> None:
    scratch = Scratch()
    child = os.fork()
    if child == 0:
        scratch.__exit__()
        os._exit(0)
    os.waitpid(child, 0)
    sent = pickle.loads(pickle.dumps(scratch))
    assert sent.path == scratch.path
    del sent
    assert scratch.path.exists()
    del scratch
    assert list(place.iterdir()) == []
