"""The house rules that a program can check: sizes, what starts without torch, where tests lie. Layers: lint-imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from dreamlora import registry

ROOT = Path(__file__).parents[1]
MAX_FUNCTION, MAX_FILE, MAX_SCRIPT = 100, 400, 60
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXCEPTIONS: dict[str, str] = PYPROJECT["tool"]["dreamlora"]["size-exceptions"]
SOURCES = sorted((ROOT / "dreamlora").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

TORCH_FREE = [
    "dreamlora.__main__",
    "dreamlora.commands.sample.flags",
    "dreamlora.commands.doctor.flags",
    "dreamlora.commands.evaluate.flags",
    "dreamlora.commands.inspect.command",
    "dreamlora.commands.inspect.findings",
    "dreamlora.commands.inspect.words",
    "dreamlora.runfolder",
    "dreamlora.report.page",
    "dreamlora.sweep.command",
    "dreamlora.sweep.worker",
    "dreamlora.tiny",
    *(
        f"dreamlora.{kind}.{name}"
        for kind in ("adapters", "optimizers", "inits", "metrics", "families.layers", "families.versions")
        for name in registry.names(kind)
    ),
]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "torchmetrics", "matplotlib")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def functions_of(tree: ast.AST) -> list[Any]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE or name_of(file) in EXCEPTIONS, f"{lines} lines: split it, or give a reason in pyproject"
    for function in functions_of(ast.parse(text)):
        length = function.end_lineno - function.lineno + 1
        allowed = length <= MAX_FUNCTION or f"{name_of(file)}:{function.name}" in EXCEPTIONS
        assert allowed, f"{function.name} has {length} lines: split it, or give a reason in pyproject"


def test_nine_of_ten_functions_are_short() -> None:
    found = [function for file in SOURCES for function in functions_of(ast.parse(file.read_text(encoding="utf-8")))]
    lengths = sorted(function.end_lineno - function.lineno + 1 for function in found)
    assert lengths[int(0.9 * len(lengths))] <= 45


def test_exceptions_are_still_needed_and_have_a_reason() -> None:
    for entry, reason in EXCEPTIONS.items():
        file, _, function = entry.partition(":")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert len(reason) > 10, f"{entry}: why?"
        if function:
            (found,) = (node for node in functions_of(ast.parse(text)) if node.name == function)
            assert found.end_lineno - found.lineno + 1 > MAX_FUNCTION, f"{entry} is small now"
        else:
            assert len(text.splitlines()) > MAX_FILE, f"{entry} is small now"


@pytest.mark.parametrize("file", sorted((ROOT / "train_scripts").glob("*.py")), ids=name_of)
def test_scripts_are_thin(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < MAX_SCRIPT


def test_what_must_start_fast_loads_nothing_heavy() -> None:
    code = "import sys, importlib\nfor name in sys.argv[1].split(): importlib.import_module(name)\n"
    code += "print(*(name for name in sys.argv[2].split() if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, " ".join(TORCH_FREE), " ".join(HEAVY)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in SOURCES}


def imports_of(file: Path) -> set[str]:
    """The modules of dreamlora that a file imports anywhere, also inside functions and for type checkers alone."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    whole = {name if name in MODULES else name.rpartition(".")[0] for name in imported}
    return whole & MODULES.keys() - {module_of(file)}


def test_no_circle_of_imports_among_files() -> None:
    graph = {module: imports_of(file) for module, file in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"files import each other: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("file", [file for file in SOURCES if file.name != "processes.py"], ids=name_of)
def test_processes_wait_for_each_other_in_one_way_only(file: Path) -> None:
    """Accelerate's and torch's own waits are collectives: NCCL ends them after 10 minutes."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    foreign = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module != "dreamlora.processes"]
    names = {alias.name for node in foreign for alias in node.names}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not names & {"wait_for_everyone", "barrier", "broadcast_object_list", "gather_object", "main_process_first"}


def test_a_class_name_stands_for_one_thing() -> None:
    """Every plug-in has its Options."""
    places: dict[str, list[str]] = defaultdict(list)
    for file in SOURCES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name != "Options":
                places[node.name.strip("_")].append(name_of(file))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_importing_reads_and_writes_nothing(file: Path) -> None:
    """No call at module level that opens files or starts processes (constants made of paths are fine)."""
    forbidden = {"open", "read_text", "write_text", "read_bytes", "mkdir", "run", "Popen", "from_pretrained", "load"}
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert called not in forbidden, f"line {node.lineno} calls {called} on import"


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_every_module_says_what_it_is(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("file", TESTS, ids=name_of)
def test_tests_lie_where_their_subject_lies(file: Path) -> None:
    """tests/a/test_b.py tests dreamlora/a/b.py, a module of dreamlora/a whose name has b, or dreamlora/a as a whole.

    tests/gpu is about what all of them do on a GPU.
    """
    place = file.parent.relative_to(ROOT / "tests")
    if place == Path("gpu"):
        return
    folder = ROOT / place if place.name in ("benchmarks", "tools") else ROOT / "dreamlora" / place
    assert folder.is_dir(), f"there is no {name_of(folder)}"
    subject = file.stem.removeprefix("test_")
    if folder == ROOT / "dreamlora" and subject not in ("architecture", "docs", "foreign_names"):
        assert any((folder / name).exists() for name in (subject, f"{subject}.py")), f"nothing is called {subject}"


@pytest.mark.parametrize("kind", ["adapters", "optimizers", "inits", "families", "metrics"])
def test_plugins_do_not_import_each_other(kind: str) -> None:
    names = registry.names(kind)
    for name in names:
        for node in ast.walk(ast.parse((ROOT / "dreamlora" / kind / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                others = {f"dreamlora.{kind}.{other}" for other in names if other != name}
                assert not imported & others, f"{name} imports {imported & others}"


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_nothing_that_only_unix_has_is_used_without_asking(file: Path) -> None:
    """Most people who train at home have Windows; importing there is all that can be tested here."""
    modules = {"fcntl", "resource", "pwd", "grp", "termios", "syslog", "posix"}
    calls = {"fork", "forkpty", "geteuid", "getuid", "getpgid", "killpg", "setsid", "mkfifo", "fchmod", "chown", "nice"}
    signals = {"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGPIPE", "SIGALRM", "SIGCHLD"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not imported & modules, f"line {node.lineno}: {imported & modules} is Unix's alone"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal"):
            assert node.attr not in calls | signals, f"line {node.lineno}: {node.value.id}.{node.attr} is Unix's alone"


def test_all_can_be_imported_without_what_only_unix_has() -> None:
    code = (
        "import importlib, os, signal, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"  # what others import is theirs to get right
        "for name in sys.argv[1:]: sys.modules.pop(name)\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
        "for name in ('fork', 'sched_getaffinity', 'O_NOFOLLOW', 'geteuid', 'killpg'): vars(os).pop(name, None)\n"
        "for name in ('SIGHUP', 'SIGUSR1', 'SIGKILL', 'SIGPIPE'): vars(signal).pop(name, None)\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    ours = [name for name in MODULES if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *ours], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


FILES_ARE_WRITTEN_BY = "files.py"
CACHES = [f"dreamlora/data/{name}.py" for name in ("cache", "catalog", "file_index")]
CACHES += ["dreamlora/runfolder.py", "dreamlora/scratch.py"]
"""They have words of their own for what the system refuses, or need none."""


@pytest.mark.parametrize("file", [file for file in SOURCES if file.name != FILES_ARE_WRITTEN_BY], ids=name_of)
def test_files_are_written_in_one_place(file: Path) -> None:
    """What writes goes to a temporary file of ``files.replacing``; folders are made and removed by ``files`` alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, owner = node.func.attr, getattr(node.func.value, "id", "")
        where = f"line {node.lineno} calls {called}"
        assert called not in ("write_text", "write_bytes") or owner == "temporary", where
        assert called not in ("rmtree", "mkdir", "unlink", "rmdir", "touch") or name_of(file) in CACHES, where


PICTURES_ARE_OPENED_BY = "dreamlora/pictures.py"


@pytest.mark.parametrize("file", [file for file in SOURCES if name_of(file) != PICTURES_ARE_OPENED_BY], ids=name_of)
def test_pictures_are_opened_in_one_place(file: Path) -> None:
    """With its bounds, and the decoders that it allows."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr == "open":
            assert ast.unparse(node.value) not in ("Image", "PIL.Image"), f"line {node.lineno} opens a picture"
        if isinstance(node, ast.ImportFrom) and node.module in ("PIL", "PIL.Image"):
            assert not {alias.name for alias in node.names} & {"open", "ImageFile"}, f"line {node.lineno}"


def text_calls_without_encoding(tree: ast.AST) -> list[int]:
    """Lines that read or write text in the encoding of whatever system they run on."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        named = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        modes = [word for word in words if isinstance(word, str) and re.fullmatch("[rwax][bt+]*", word)]
        opens_text = named in ("open", "fdopen") and any("b" not in mode for mode in modes)
        pipes_text = any(keyword.arg == "text" for keyword in node.keywords)
        if opens_text or pipes_text or (named in ("read_text", "write_text") and words != ["direct_url.json"]):
            lines.append(node.lineno)
    return lines


OTHERS = [file for place in ("train_scripts", "tools", "benchmarks") for file in (ROOT / place).rglob("*.py")]


@pytest.mark.parametrize("file", [*SOURCES, *OTHERS], ids=name_of)
def test_every_text_file_is_utf_8(file: Path) -> None:
    """Whatever the system's own encoding is: files go from one machine to another."""
    assert text_calls_without_encoding(ast.parse(file.read_text(encoding="utf-8"))) == []


FAMILIES = registry.names("families")


@pytest.mark.parametrize("file", [file for file in SOURCES if "families" not in file.parts], ids=name_of)
def test_no_family_is_named_outside_of_its_own_file(file: Path) -> None:
    """Nothing asks which family it works for: what differs is asked of the family (``interfaces.Family``)."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant):
            assert node.value not in FAMILIES, f"line {node.lineno} names {node.value}"
        if isinstance(node, ast.ImportFrom | ast.Import):
            assert "dreamlora.families" not in ast.unparse(node), f"line {node.lineno} imports a family"
        if isinstance(node, ast.Compare):
            assert "family.__name__" not in ast.unparse(node), f"line {node.lineno} compares families"
