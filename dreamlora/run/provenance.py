"""What made a run: options (config.yaml), versions, commit, device, command."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.credentials import command_line, masked_options
from dreamlora.escapes import yaml_comment, yaml_text
from dreamlora.files import write_atomically
from dreamlora.interfaces import ModelSource
from dreamlora.run.continuing import FROM_FILE
from dreamlora.runfolder import RunFolder

_PACKAGES = ("dreamlora", "torch", "diffusers", "transformers", "peft", "accelerate", "tokenizers", "numpy", "Pillow")
COMMIT_DIGITS = 12


def write_config(config: RunConfig, folder: RunFolder, device: torch.device) -> None:
    """config.yaml: what ``--config`` takes to run the same again, with what made it as a comment.

    Without secrets, and without what is about this run's folder: the other run gets one of its own.
    """
    left_out: tuple[str, ...] = (
        "hub_token",
        "local_rank",
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
    )
    if config.lora.init_lora is not None:
        left_out += tuple(name for name in FROM_FILE if name not in config.given)
    options = masked_options({name: value for name, value in as_flat_dict(config).items() if name not in left_out})
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    made_by = f"commit {git_commit()}, {device_name(device)}"
    head = "".join(map(yaml_comment, (command(), packages, made_by)))
    write_atomically(folder.config_file, head + yaml_text(options))


def write_base_model(source: ModelSource, folder: RunFolder, init_lora: str | None = None) -> None:
    """base_model.json: what exactly was trained. config.yaml has what was given; a branch or a folder can change.

    Args:
        source: the model.
        folder: of the run.
        init_lora: what the file holds that the LoRA went on from, in a few digits.
    """
    base = {"id": source.model_id, "revision": source.revision, "vae_revision": source.vae_revision}
    if init_lora:
        base["init_lora"] = init_lora
    write_atomically(folder.base_model_file, json.dumps(base, indent=1))


@functools.cache  # of what runs: what is installed, or checked out, meanwhile is not
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    version_by_package = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            version_by_package[package.lower()] = version(package)
        except PackageNotFoundError:
            continue
    return version_by_package


@functools.cache
def git_commit() -> str | None:
    """Commit of the dreamlora checkout (with "+" if it was changed since), or the one that pip installed; else None."""
    package = Path(__file__).resolve().parents[1]
    try:
        # A virtual environment often lies in its owner's repository, whose commit says nothing of this package.
        if Path(_git("rev-parse", "--show-toplevel", folder=package)).resolve() != package.parent:
            return _installed_commit(package)
        _git("ls-files", "--error-unmatch", "__init__.py", folder=package)
        commit = _git("rev-parse", f"--short={COMMIT_DIGITS}", "HEAD", folder=package)
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", str(package), folder=package)
    except (OSError, subprocess.SubprocessError):
        return _installed_commit(package)
    return commit + ("+" if changed else "")


def _installed_commit(package: Path) -> str | None:
    """What pip noted when it installed this very package from a repository (direct_url.json)."""
    try:
        installed = distribution(package.name)
        noted = json.loads(installed.read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    if Path(str(installed.locate_file(package.name))).resolve() != package:
        return None
    commit = noted.get("vcs_info", {}).get("commit_id")
    return commit[:COMMIT_DIGITS] if commit else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread" + "s" * (threads > 1)


def command() -> str:
    """The command line, to be typed again; without secrets, since it is written to files that people share."""
    program = Path(sys.argv[0])
    by_name = program.name in ("__main__.py", "dreamlora")
    name = ["dreamlora"] if by_name else ["accelerate", "launch", str(_relative(program))]
    return command_line([*name, *sys.argv[1:]])


def _relative(path: Path) -> Path:
    return path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path


def _git(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, encoding="utf-8", timeout=10
    )
    return done.stdout.strip()
