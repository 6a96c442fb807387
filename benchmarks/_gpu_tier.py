"""The tests that need a GPU, as a process of their own; what became of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
LONGEST_MESSAGE = 2000
PATIENCE_S = 30
QUICK = "not scaled_adamw and not lora_muon"
"""What is enough to see that the tests work."""


def files() -> list[str]:
    """Those with such tests: others would only be imported, with all that they need."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in tests if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def run(device: str, seconds: float, quick: bool = False) -> dict[str, Any]:
    """Run the tests for so long at most; see ``outcomes``."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml", str(report)]
        started = time.monotonic()
        process = subprocess.Popen(
            [*command, *(["-k", QUICK] if quick else []), *files()], cwd=ROOT, env=_environment(device)
        )
        ended = _wait(process, seconds)
        found = outcomes(report.read_text(encoding="utf-8")) if report.exists() else {"counts": {}, "tests": []}
    return {
        "status": process.returncode if ended else f"stopped after {seconds:.0f} s",
        "seconds": round(time.monotonic() - started, 1),
        **found,
    }


def outcomes(report: str) -> dict[str, Any]:
    """What a JUnit report says: ``counts`` by outcome, and of every test its name, outcome, seconds and message."""
    tests = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        test = {"name": f"{case.get('classname')}::{case.get('name')}", "seconds": float(case.get("time", 0))}
        problem = next((part for part in case if part.tag in _OUTCOMES), None)
        if problem is None:
            tests.append({**test, "outcome": "passed"})
        else:
            message = (problem.get("message") or "")[:LONGEST_MESSAGE]
            tests.append({**test, "outcome": _OUTCOMES[problem.tag], "message": message})
    return {"counts": dict(Counter(test["outcome"] for test in tests)), "tests": tests}


_OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def _environment(device: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"DREAMLORA_GPU_TESTS_DEVICE": device, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ended in time; else it is asked to write its report of what it has done."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return False
