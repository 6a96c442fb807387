"""Every optimizer on Apple silicon, which has neither float64 nor most decompositions: it takes the CPU's steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dreamlora import linalg, registry
from dreamlora.errors import UserError
from dreamlora.optimizers import check_compatibility, lora_param_groups, scaled_gd
from tests.fakemps import FakeMps
from tests.inits.problems import on_device, problem

WITH_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in registry.names("optimizers")),
    ("lora_muon", {"trust": 0.0}),
    ("lora_tsd", {"trust": 0.0, "projections": 1}),
    ("lora_rite", {"apply_escape": True, "update_skipping": 1.0}),
    ("scaled_adamw", {"damping": 0.0, "variant": "split"}),
    ("scaled_adamw", {"damping": 1e-3, "geometry": "balanced"}),
    ("scaled_adamw", {"geometry": "tangent", "transport_momentum": True}),
    ("scaled_adamw", {"damping": 1e-6, "damping_mode": "absolute", "unscaled_below": 1e-6}),
    ("scaled_gd", {"damping": 1e-6}),
]


@pytest.fixture(autouse=True)
def mps() -> Iterator[None]:
    with FakeMps():
        yield


@pytest.mark.parametrize(("name", "settings"), WITH_SETTINGS)
def test_the_steps_are_those_of_the_cpu(name: str, settings: dict[str, Any]) -> None:
    try:
        registry.check_needs("optimizers", name)
    except UserError as error:
        pytest.skip(str(error))
    plugin = registry.load("optimizers", name)
    here = problem()
    for target in here.targets:
        nn.init.normal_(target.B, std=0.3 if settings else 0.0)
    there = on_device(here)
    for made in (here, there):
        optimizer = plugin.build(lora_param_groups(made.net, lr=1e-2, weight_decay=0.0), plugin.Options(**settings))
        for number in range(2):
            made.probe.loss(number).backward()
            optimizer.step()
            optimizer.zero_grad()
    # what a gradient has outside of the factors' spans is found by subtraction, which takes float64
    atol = 3e-3 if name == "lora_tsd" else 1e-4
    for one, other in zip(here.targets, there.targets, strict=True):
        torch.testing.assert_close(other.A.cpu(), one.A, rtol=2e-3, atol=atol)
        torch.testing.assert_close(other.B.cpu(), one.B, rtol=2e-3, atol=atol)


def test_the_norm_that_pairs_are_clipped_by() -> None:
    norms = []
    here = problem()
    for target in here.targets:
        nn.init.normal_(target.B, std=0.3)
    for made in (here, on_device(here)):
        made.probe.loss(0).backward()
        optimizer = scaled_gd.build(lora_param_groups(made.net), scaled_gd.Options())
        norms.append(float(optimizer.clip_lora_grad_norm_(1.0)))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_the_check_of_gradients() -> None:
    there = on_device(problem())
    there.probe.loss(0).backward()
    assert max(check_compatibility(there.net).values()) < 1e-5


def test_gram_matrices_of_few_directions_can_be_factored_in_float32() -> None:
    """The device has no float64: the level must be above what rounding makes of eigenvalues that are zero."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(100, 320, 4, generator=generator) @ torch.randn(100, 4, 16, generator=generator)
    K = few.mT @ few
    level = linalg.rounding_level(torch.float32, linalg.gram_dtype(torch.device("mps")))
    assert not linalg.orthonormal_coordinates(K, level).failed.any()
    assert linalg.orthonormal_coordinates(K, level / 30).failed.any()  # so much is needed
