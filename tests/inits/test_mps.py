"""Every init on Apple silicon, which has neither float64 nor most decompositions: it starts as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dreamlora import registry
from tests.fakemps import FakeMps
from tests.inits.problems import on_device, problem

SETTINGS: dict[str, dict[str, Any]] = {"eva": {"draws": 12, "tau": 0.5}, "lora_ga": {"draws": 12, "iterations": 1}}
WITH_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, SETTINGS.get(name, {})) for name in registry.names("inits")),
    ("nora", {"orthonormalize": True}),
    ("pissa", {"niter": 4}),
]


@pytest.fixture(autouse=True)
def mps() -> Iterator[None]:
    with FakeMps():
        yield


@pytest.mark.parametrize(("name", "settings"), WITH_SETTINGS)
def test_the_start_is_that_of_the_cpu(name: str, settings: dict[str, Any]) -> None:
    here, there = problem(), on_device(problem())
    if name == "eva":
        for made in (here, there):
            made.targets = [target for target in made.targets if target.name != "conv"]
    for one, other in zip(here.start(name, **settings), there.start(name, **settings), strict=True):
        torch.testing.assert_close(other.A.cpu(), one.A)
        torch.testing.assert_close(other.B.cpu(), one.B)
    torch.testing.assert_close(there.net(there.batches[0]).cpu(), here.net(here.batches[0]))
