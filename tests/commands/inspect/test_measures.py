"""Norms and largest singular values from factors are those of the ΔW that is applied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamlora.commands.inspect.measures import Measure
from dreamlora.lora.formats import _factors
from dreamlora.lora.weights import LayerWeights

A = {
    "linear": {"lora_A": (4, 12), "lora_B": (20, 4)},
    "more ranks than columns": {"lora_A": (16, 12), "lora_B": (20, 16)},
    "convolution": {"lora_A": (4, 6, 3, 3), "lora_B": (10, 4, 1, 1)},
    "convolution the other way": {"lora_A": (4, 6, 1, 1), "lora_B": (10, 4, 3, 3)},
    "Tucker": {"lora_A": (4, 6, 1, 1), "lora_B": (10, 4, 1, 1), "lora_mid": (4, 4, 3, 3)},
    "LoHa": {"hada_w1_a": (10, 3), "hada_w1_b": (3, 8), "hada_w2_a": (10, 3), "hada_w2_b": (3, 8)},
    "LoHa of a convolution": {
        **{"hada_t1": (3, 3, 2, 2), "hada_w1_a": (3, 10), "hada_w1_b": (3, 8)},
        **{"hada_t2": (3, 3, 2, 2), "hada_w2_a": (3, 10), "hada_w2_b": (3, 8)},
    },
    "LoKr": {"lokr_w1": (3, 2), "lokr_w2_a": (5, 4), "lokr_w2_b": (4, 7)},
    "LoKr of whole matrices": {"lokr_w1": (3, 2), "lokr_w2": (5, 7)},
    "LoKr of products": {
        **{"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 4)},
        **{"lokr_w2_a": (5, 2), "lokr_w2_b": (2, 7)},
    },
    "LoKr of a convolution": {"lokr_w1": (3, 2), "lokr_w2": (5, 7, 3, 3)},
    "LoKr with a core": {"lokr_w1": (3, 2), "lokr_t2": (4, 4, 3, 3), "lokr_w2_a": (4, 5), "lokr_w2_b": (4, 7)},
}


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", A)
def test_sizes_are_those_of_delta(name):
    factors = drawn(A[name])
    weights = _factors.weights_of("layer", {**factors, "alpha": torch.tensor(1.5)})
    delta = weights.delta().double().flatten(1)
    size = Measure().size_of({part: tensor.numpy() for part, tensor in factors.items()}, weights.scale)
    assert size.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert size.largest == pytest.approx(float(torch.linalg.matrix_norm(delta, 2)), rel=1e-3)
    assert 1 <= size.stable_rank <= torch.linalg.matrix_rank(delta) * 1.01


def test_large_ranks_are_measured_by_subspace_iteration():
    factors = drawn({"lora_A": (300, 400), "lora_B": (350, 300)})
    delta = LayerWeights("lora", factors, 300.0).delta()
    size = Measure().size_of({part: tensor.numpy() for part, tensor in factors.items()}, 1.0)
    assert size.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert size.largest == pytest.approx(float(torch.linalg.matrix_norm(delta, 2)), rel=0.05)


def test_what_does_not_fit_together_or_is_too_large_is_not_measured():
    ones = np.ones
    assert Measure().size_of({"lora_A": ones((3, 4)), "lora_B": ones((4, 2))}, 1.0) is None
    assert Measure().size_of({"lora_A": ones((0, 4)), "lora_B": ones((4, 0))}, 1.0) is None
    assert Measure(left=40.0).size_of({"lora_A": ones((3, 4)), "lora_B": ones((4, 3))}, 1.0) is None
    wide = {"hada_w1_a": ones((2**20, 1)), "hada_w1_b": ones((1, 2**20))}
    assert Measure().size_of({**wide, "hada_w2_a": ones((2**20, 1)), "hada_w2_b": ones((1, 2**20))}, 1.0) is None
    one_row = {"hada_w2_a": ones((1, 1)), "hada_w2_b": ones((1, 2**20))}
    assert Measure().size_of({"hada_w1_a": ones((2**20, 1)), "hada_w1_b": ones((1, 1)), **one_row}, 1.0) is None
    assert Measure().size_of({"lora_A": ones((3, 4)), "lora_B": ones((4, 3))}, float("nan")) is None
    huge = np.full((4, 3), 3e38, np.float32)
    assert Measure().size_of({"lora_A": huge.T, "lora_B": huge}, 1.0) is None


def test_no_change_has_no_rank():
    size = Measure().size_of({"lora_A": np.ones((3, 4)), "lora_B": np.zeros((4, 3))}, 1.0)
    assert size == (0.0, 0.0)
    assert size.stable_rank == 0
