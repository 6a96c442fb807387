"""The commit that a run records is one of dreamlora's, or none; what is noted beside the options leaves them whole."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dreamlora.config import RunConfig
from dreamlora.reading import yaml_of
from dreamlora.run import provenance
from dreamlora.runfolder import RunFolder

INSIDE = "dreamlora/run/provenance.py"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def package_in(folder: Path) -> Path:
    """A package as it lies in a checkout or in site-packages."""
    (folder / "dreamlora" / "run").mkdir(parents=True)
    (folder / "dreamlora" / "__init__.py").touch()
    (folder / INSIDE).touch()
    return folder


def commit_all(repository: Path) -> str:
    git(repository, "init", "-q")
    (repository / "theirs.py").touch()
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "theirs")
    return git(repository, "rev-parse", "--short=12", "HEAD")


def recorded(monkeypatch: pytest.MonkeyPatch, package: Path) -> str | None:
    monkeypatch.setattr(provenance, "__file__", str(package / INSIDE))
    return provenance.git_commit.__wrapped__()


def test_it_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = commit_all(package_in(tmp_path))
    assert recorded(monkeypatch, tmp_path) == commit
    (tmp_path / "theirs.py").write_text("changed", encoding="utf-8")
    assert recorded(monkeypatch, tmp_path) == commit, "no part of the package"
    (tmp_path / INSIDE).write_text("changed", encoding="utf-8")
    assert recorded(monkeypatch, tmp_path) == commit + "+"


@pytest.mark.parametrize("place", [".venv/lib/site-packages", "."], ids=["virtual environment", "top"])
def test_it_is_not_that_of_a_repository_that_the_package_merely_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / ".gitignore").write_text(".venv\ndreamlora\n", encoding="utf-8")
    commit_all(tmp_path)
    assert recorded(monkeypatch, package_in(tmp_path / place)) is None


def test_nor_of_one_that_tracks_its_virtual_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_in(tmp_path / ".venv" / "lib" / "site-packages")
    commit_all(tmp_path)
    assert recorded(monkeypatch, package) is None


def test_pip_knows_the_commit_that_it_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_in(tmp_path / "site-packages")
    about = package / "dreamlora-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dreamlora\nVersion: 1.0\n", encoding="utf-8")
    vcs = {"vcs": "git", "commit_id": "0123456789abcdef0123456789abcdef01234567"}
    (about / "direct_url.json").write_text(
        json.dumps({"url": "https://host/dreamlora", "vcs_info": vcs}), encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(package))
    assert recorded(monkeypatch, package) == "0123456789ab"
    (tmp_path / "another").mkdir()
    assert recorded(monkeypatch, package_in(tmp_path / "another")) is None, "that is about another copy of the package"
    (about / "direct_url.json").write_text(
        json.dumps({"url": "file:///home", "dir_info": {"editable": True}}), encoding="utf-8"
    )
    assert recorded(monkeypatch, package) is None


def test_a_git_that_hangs_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("git", 10)

    commit_all(package_in(tmp_path))
    monkeypatch.setattr(subprocess, "run", hang)
    assert recorded(monkeypatch, tmp_path) is None


@pytest.mark.parametrize(
    "word", ["a photo\nof sks dog", "a\r\nb", "a\u2028b", "\x1b[1m", "ü 犬 \U0001f436", "a\tb", "a\x85b", "caf\udce9"]
)
def test_the_command_that_is_noted_spoils_no_options(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dreamlora", "dreambooth", "--instance_prompt", word])
    config = dataclasses.replace(RunConfig(), data=dataclasses.replace(RunConfig().data, instance_prompt=word))
    provenance.write_config(config, RunFolder(tmp_path), torch.device("cpu"))
    assert RunFolder(tmp_path).config()["instance_prompt"] == word
    written = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert yaml_of(written)["instance_prompt"] == word, "as other programs of this package read it"
    assert written.count("\n") == len(written.splitlines())
