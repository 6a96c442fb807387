"""What documents and Makefile say can be followed: links lead somewhere, flags exist, commands parse. Torch-free."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dreamlora import __main__
from dreamlora.cli.declared import options_of
from dreamlora.cli.foreign import ELSEWHERE, UNNEEDED
from dreamlora.cli.parse import Program, parse, parse_run
from dreamlora.commands.doctor import flags as doctor
from dreamlora.commands.evaluate.flags import EvaluateConfig
from dreamlora.commands.export.flags import ExportConfig
from dreamlora.commands.inspect.flags import InspectConfig
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.config import RunConfig, programs
from dreamlora.sweep.config import CompareConfig
from dreamlora.sweep.config import parse as parse_compare
from dreamlora.sweep.plan import sweep_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    file
    for pattern in ("*.md", "docs/*.md", "prompts/*.md", "outputs/README.md", "benchmarks/*.md")
    for file in ROOT.glob(pattern)
)

OURS = {
    name
    for config in (
        RunConfig,
        programs.TextToImageConfig,
        EvaluateConfig,
        ExportConfig,
        doctor.DoctorConfig,
        __main__.ReportConfig,
        CompareConfig,
    )
    for name in options_of(config)
}
OTHER_PROGRAMS = {
    "accelerate": {
        "cpu",
        "dynamo_backend",
        "multi_gpu",
        "num_cpu_threads_per_process",
        "num_machines",
        "num_processes",
    },
    "ours, but no options of a run": {"config", "help"},
}
SCRIPTS = {
    "tools": ROOT / "tools" / "pretrain.py",
    "benchmarks": ROOT / "benchmarks",
}
"""Programs with flags of their own; they are looked for in the source."""
WITH_LORA: dict[str, Any] = {"sample": SampleConfig, "evaluate": EvaluateConfig, "export": ExportConfig}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def anchors_of(file: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    prose = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def script_flags() -> set[str]:
    files = [file for place in SCRIPTS.values() for file in ([place] if place.is_file() else place.glob("*.py"))]
    return {flag for file in files for flag in re.findall(r'"--(\w+)"', file.read_text(encoding="utf-8"))}


def commands_of(text: str) -> list[list[str]]:
    """The words of every command in indented or fenced blocks and of make's recipes, without variables before it."""
    lines = text.replace("\\\n", " ").replace("\t$(BIN)/", 4 * " ").splitlines()
    blocks = [line.strip() for line in lines if re.match(r"\s{4,}(\w+=\S+ )*(accelerate launch|dreamlora) ", line)]
    return [[word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)] for line in blocks]


COMMANDS = [
    pytest.param(words, id=f"{name_of(file)}-{number}")
    for file in [*DOCUMENTS, ROOT / "Makefile"]
    for number, words in enumerate(commands_of(file.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.is_relative_to(ROOT), f"{target} leaves the repository"
        assert linked.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors_of(linked), f"{target}: no such heading"


@pytest.mark.parametrize("file", DOCUMENTS, ids=name_of)
def test_flags_exist(file: Path) -> None:
    foreign = {*ELSEWHERE, *UNNEEDED, *script_flags()}.union(*OTHER_PROGRAMS.values())
    for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", file.read_text(encoding="utf-8")):
        assert flag.removeprefix("no_") in OURS | foreign, f"--{flag} is no option"


def command_and_flags(words: list[str], place: Path) -> tuple[str, list[str]]:
    """What a document's command calls, and its flags; ``place``, where it is to run, gets the files that it names."""
    for name in ("photos", "captioned", "run", "dog"):
        (place / name).mkdir(parents=True)
    for name in ("my_lora.safetensors", "run/evalset_final.json"):
        (place / name).touch()
    (place / "sets.yaml").write_text("datasets: [{instance_data_dir: dog, repeats: 10}]", encoding="utf-8")
    (place / "prompts").symlink_to(ROOT / "prompts")
    script = next((number for number, word in enumerate(words) if word.startswith("train_scripts/")), None)
    if script is not None:
        assert (ROOT / words[script]).exists()
        command = Path(words[script]).stem.removesuffix("_lora").replace("_", "-")
        words = ["dreamlora", command, *words[script + 1 :]]
    program, command, *flags = [re.sub(r"outputs/<\w+>", "run", word) for word in words if word != "..."]
    assert program == "dreamlora" and command in __main__.COMMANDS
    return command, flags


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, flags = command_and_flags(words, tmp_path)
    if command in programs.PROGRAMS:
        parse_run(flags, programs.PROGRAMS[command])
    elif command == "compare":
        asked, training = parse_compare(flags)
        assert asked.runs or sweep_of(asked, training)
    elif command == "doctor":
        doctor.parse(flags)
    elif command == "inspect":
        parse(InspectConfig, flags, Program(positional="file"))
    elif command in WITH_LORA:
        parse(WITH_LORA[command], flags, Program(positional="lora"))
    else:
        parse(__main__.ReportConfig, flags, Program(positional="run"))


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) >= 6


def shown_diffs() -> list[tuple[str, list[str]]]:
    """Every file of the diffs in CONTRIBUTING.md, with the lines that they add to it."""
    blocks = re.findall(
        r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL | re.M
    )
    parts = [part for block in blocks for part in re.split(r"^\+\+\+ b/", block, flags=re.M)[1:]]
    return [(lines[0], [line[1:] for line in lines if line.startswith("+")]) for lines in map(str.splitlines, parts)]


def test_what_contributors_are_shown_is_the_code() -> None:
    shown = shown_diffs()
    assert len(shown) == 3
    for name, lines in shown:
        rest = iter((ROOT / name).read_text(encoding="utf-8").splitlines())
        for line in lines:
            assert line in rest, f"{name} has no such line, or not there: {line}"


def test_contributors_are_shown_every_member_of_a_family() -> None:
    tree = ast.parse((ROOT / "dreamlora" / "interfaces" / "family.py").read_text(encoding="utf-8"))
    contract = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Family")
    members = [node.target.id for node in contract.body if isinstance(node, ast.AnnAssign)]
    members += [node.name for node in contract.body if isinstance(node, ast.FunctionDef)]
    _, lines = shown_diffs()[0]
    shown = {match.group(1) for line in lines if (match := re.match(r"(?:def )?(\w+)[:( ]", line))}
    assert not set(members) - shown


def test_files_that_contributors_are_told_of_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = text.partition("## Where things are")[2].partition("\n## ")[0]
    there = {"_name.py", *(file.name for file in (ROOT / "dreamlora").rglob("*.py"))}
    assert not set(re.findall(r"\b\w+\.py\b", places)) - there
