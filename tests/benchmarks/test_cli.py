"""Every benchmark tells what a person can mend in one message, with exit status 2."""

from __future__ import annotations

import argparse
import runpy
from typing import NoReturn

import pytest

from dreamlora.errors import UserError
from tests.benchmarks.test_benchmarks import BENCHMARKS

SCRIPTS = [*sorted(BENCHMARKS.glob("[a-z]*.py")), BENCHMARKS / "_random_pipelines.py"]


def mistaken(*_: object) -> NoReturn:
    raise UserError("--steps takes a number above 0 (got 0)")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_wrong_value_is_one_message(
    script: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", [str(script)])
    for parse in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, parse, mistaken)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --steps takes a number above 0 (got 0)\n"
