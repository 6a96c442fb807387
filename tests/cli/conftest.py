"""Every program that reads a command line."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from dreamlora.__main__ import ReportConfig
from dreamlora.commands.evaluate.flags import EvaluateConfig
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.config import RunConfig, TextToImageConfig
from dreamlora.sweep.config import CompareConfig


class Case(NamedTuple):
    """A program's options, and the flags that it cannot do without."""

    config: type
    needed: tuple[str, ...]


CASES = [
    Case(RunConfig, ()),
    Case(TextToImageConfig, ()),
    Case(CompareConfig, ("--optimizers", "adamw")),
    Case(SampleConfig, ("--lora", ".")),
    Case(EvaluateConfig, ("--lora", ".")),
    Case(ReportConfig, ("--run", ".")),
]


@pytest.fixture(params=CASES, ids=lambda case: case.config.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param
