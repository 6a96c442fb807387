"""What is imported, installed and started is decided by this program's files: names that a run, a config or a folder
brings are names of the registry, or errors."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions, requires, version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from dreamlora import registry
from dreamlora.cli.parse import parse_run
from dreamlora.errors import UserError
from tests.fuzzing import fuzzed, odd_values

ROOT = Path(__file__).parents[1]
KINDS = ("adapters", "optimizers", "inits", "families", "metrics")
FOREIGN = [
    "os",
    "antigravity",
    "../x",
    "a.b",
    "adamw.os",
    "..sweep.worker",
    "dreamlora.cli",
    "/tmp/x",
    "adamw/../x",
    "",
    ".",
]


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules that the registry loads."""
    names: list[str] = []
    load = importlib.import_module

    def note(name: str, package: str | None = None) -> Any:
        names.append(name)
        return load(name, package)

    monkeypatch.setattr(registry.importlib, "import_module", note)
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_that_is_no_plugin_imports_nothing(kind: str, name: str, imported: list[str]) -> None:
    with pytest.raises(UserError, match="unknown name"):
        registry.load(kind, name)
    assert imported == []


@fuzzed
@given(name=st.one_of(st.text(max_size=30), odd_values.filter(lambda value: isinstance(value, str))))
def test_fuzz_registry(name: str) -> None:
    for kind in KINDS:
        try:
            assert registry.check(kind, name) in registry.names(kind)
        except UserError:
            continue


OPTIONS = (
    "optimizer",
    "init",
    "family",
    "eval_metrics",
    "report_to",
    "lr_scheduler",
    "mixed_precision",
    "prediction_type",
)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", [name for name in FOREIGN if name])
def test_a_foreign_config_names_no_module(option: str, name: str, tmp_path: Path, imported: list[str]) -> None:
    file = tmp_path / "config.yaml"
    value = f"[{name!r}]" if option == "eval_metrics" else repr(name)
    file.write_text(f"{option}: {value}\n", encoding="utf-8")
    with pytest.raises(UserError):
        parse_run(["--config", str(file)])
    assert [module for module in imported if name in module and name not in "./"] == []


OPTIONAL = ("datasets", "pillow_heif", "tensorboard", "wandb", "bitsandbytes", "torchao", "prodigyopt", "schedulefree",
            "pytorch_optimizer", "sentencepiece", "IPython")  # fmt: skip


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A folder that has a file for every package that could be taken for it, and says so if it is."""
    place = tmp_path / "stranger"
    place.mkdir()
    names = [*OPTIONAL, "torch", "numpy", "yaml", "dreamlora", "sitecustomize", "usercustomize", "typing_extensions"]
    for name in [*names, "dreamlora_plugin", "adamw", "clip_score"]:
        (place / f"{name}.py").write_text(f"print('took {name}')\n", encoding="utf-8")
    return place


def environment(*places: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}


def test_a_worker_takes_no_package_from_the_current_folder(stranger: Path, tmp_path: Path) -> None:
    code = "from dreamlora.sweep.pool import WORKER, _Worker; from dreamlora.sweep.seats import Seat; import sys\n"
    code += "from pathlib import Path\nworker = _Worker(Seat(), Path(sys.argv[1]), WORKER); worker.start()\n"
    code += "process = worker._processes[0]; process.stdin.close(); process.wait(60)"
    log = tmp_path / "worker.log"
    words = [sys.executable, "-P", "-c", code, str(log)]
    subprocess.run(words, cwd=stranger, env=environment(str(ROOT)), check=True)
    text = log.read_text(encoding="utf-8")
    assert "took" not in text and "Traceback" not in text and "No module" not in text


def test_a_run_imports_optional_packages_only_when_asked(tmp_path: Path) -> None:
    code = (
        "import sys, runpy\n"
        "from dreamlora.__main__ import main\n"
        "status = main(sys.argv[1:])\n"
        f"print('status', status, 'imported', sorted(set(sys.modules) & {set(OPTIONAL)!r}))"
    )
    words = ["dreambooth", "--max_train_steps", "1", "--output_dir", str(tmp_path / "run"), "--eval_steps", "0"]
    words += ["--sample_steps", "0", "--no_parity_check", "--no_with_prior_preservation", "--eval_metrics"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(str(ROOT)),
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=tmp_path,
    )
    assert "status 0 imported []" in done.stdout, done.stdout + done.stderr[-2000:]


# Versions.


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return {canonical(name): pinned for name, _, pinned in (line.partition("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(requirements: list[str], extras: tuple[str, ...] = ("",)) -> Iterator[str]:
    """All that these need, directly or not, on this machine."""
    waiting = [(Requirement(text), extras) for text in requirements]
    seen = set()
    while waiting:
        requirement, asked = waiting.pop()
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in asked):
            continue
        key = (canonical(requirement.name), tuple(sorted(requirement.extras)))
        if key in seen:
            continue
        seen.add(key)
        yield key[0]
        waiting += [(Requirement(text), ("", *requirement.extras)) for text in requires(requirement.name) or []]


def test_all_that_is_installed_for_the_tests_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    here = {canonical(one.metadata["Name"]) for one in distributions()}
    names = sorted({*needed([*wanted, *project["build-system"]["requires"]])} & here)
    assert len(names) > 60 and [name for name in names if name not in pins()] == []
    if os.environ.get("VIRTUAL_ENV", sys.prefix).endswith(".venv"):
        wrong = [name for name in names if version(name).split("+")[0] != pins()[name]]
        assert wrong == []


def test_the_makefile_installs_by_the_pins_and_runs_no_build_of_others() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if "$(INSTALL)" in line]
    assert len(installs) == 5 and all(" -c " in line for line in installs)
    assert all("--no-build-isolation" in line or "setuptools" in line or "--no-deps" in line for line in installs)
    assert all("--only-binary :all:" in line for line in installs if "$(OLDEST)" not in line)
    assert not [line for line in lines if "pip install" in line and not line.startswith("INSTALL :=")]
    assert "make check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_nothing_of_the_package_installs_or_downloads_programs() -> None:
    """Processes that are started: git for the commit, nvidia-smi, and this program's own workers."""
    started = set()
    for file in (ROOT / "dreamlora").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\bos\.(system|popen|exec\w+|spawn\w+)\(|shell=True|__import__", text), file
        started |= {file.name} if re.search(r"subprocess\.(run|Popen|check)", text) else set()
    assert started <= {"provenance.py", "gpus.py", "pool.py"}
