"""Every metric over vectors that lie on Apple silicon, which has no float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamlora import registry
from dreamlora.interfaces import MetricInputs
from dreamlora.metrics._vectors import unit
from tests.fakemps import FakeMps, on_mps


@pytest.mark.parametrize("name", registry.names("metrics"))
def test_a_metric_is_that_of_the_cpu(name: str, rows: Callable[..., Tensor]) -> None:
    inputs = MetricInputs(
        generated=rows(6, 6, 1),
        groups=torch.tensor([0, 0, 1, 1, 1, 2]),
        with_subject=torch.tensor([True, True, True, True, True, False]),
        prompts=rows(6, 6, 2),
        references=rows(4, 6, 3),
        training=rows(5, 6, 4),
        base=rows(6, 6, 5),
    )
    vectors = {key: x for key, x in vars(inputs).items() if isinstance(x, Tensor) and x.is_floating_point()}
    compute = registry.load("metrics", name).compute
    with FakeMps():
        there = dataclasses.replace(inputs, **{key: on_mps(x.float()) for key, x in vectors.items()})
        here = dataclasses.replace(inputs, **{key: x.float() for key, x in vectors.items()})
        assert compute(there) == compute(here)
        torch.testing.assert_close(unit(on_mps(rows(2, 3, 0).float())), unit(rows(2, 3, 0).float()))
