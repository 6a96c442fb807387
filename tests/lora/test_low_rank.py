"""Singular values of adapters and LoRAs of lower rank, against dense computations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamlora.lora.low_rank import Cut, Kept, kept, resized, spectrum_of, spectrum_of_matrix
from dreamlora.lora.weights import LayerWeights, lora_weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


ADAPTERS = {
    "lora": lora_weights(draw(4, 12), draw(9, 4), alpha=2.5),
    "lora of more ranks than columns": lora_weights(draw(30, 12), draw(9, 30), alpha=2.5),
    "lora of a negative scale": lora_weights(draw(4, 12), draw(9, 4), alpha=-3.0),
    "convolution": lora_weights(draw(4, 5, 3, 3), draw(9, 4, 1, 1), alpha=2.5),
    "convolution with its kernel in B": lora_weights(draw(4, 5, 1, 1), draw(9, 4, 3, 3), alpha=2.5),
    "loha": LayerWeights(
        "loha",
        {
            "hada_w1_a": draw(9, 2, seed=1),
            "hada_w1_b": draw(2, 12, seed=2),
            "hada_w2_a": draw(9, 2, seed=3),
            "hada_w2_b": draw(2, 12, seed=4),
        },
        1.0,
    ),
    "loha with cores": LayerWeights(
        "loha",
        {
            "hada_w1_a": draw(2, 9, seed=1),
            "hada_w1_b": draw(2, 5, seed=2),
            "hada_w2_a": draw(2, 9, seed=3),
            "hada_w2_b": draw(2, 5, seed=4),
            "hada_t1": draw(2, 2, 3, 3, seed=5),
            "hada_t2": draw(2, 2, 3, 3, seed=6),
        },
        1.0,
    ),
    "lokr": LayerWeights("lokr", {"lokr_w1": draw(3, 4), "lokr_w2": draw(3, 5)}, 1.0),
    "lokr of products": LayerWeights(
        "lokr",
        {"lokr_w1_a": draw(3, 2), "lokr_w1_b": draw(2, 4), "lokr_w2_a": draw(5, 2), "lokr_w2_b": draw(2, 3)},
        -1.5,
    ),
    "lokr of a convolution": LayerWeights("lokr", {"lokr_w1": draw(3, 2), "lokr_w2": draw(4, 3, 3, 3)}, 1.0),
    "lokr with a core": LayerWeights(
        "lokr",
        {"lokr_w1": draw(3, 2), "lokr_w2_a": draw(2, 4), "lokr_w2_b": draw(2, 5), "lokr_t2": draw(2, 2, 3, 3)},
        1.0,
    ),
}


def low(adapter: LayerWeights, cut: Cut) -> Kept:
    return resized(adapter, cut, spectrum_of(adapter))


@pytest.fixture(params=ADAPTERS, ids=str)
def adapter(request: pytest.FixtureRequest) -> LayerWeights:
    return ADAPTERS[request.param]


def test_spectrum_is_that_of_the_dense_matrix(adapter: LayerWeights) -> None:
    dense = adapter.delta().flatten(1)
    spectrum = spectrum_of(adapter)
    expected = torch.linalg.svdvals(dense)
    torch.testing.assert_close(spectrum.S, expected[: len(spectrum.S)])
    assert expected[len(spectrum.S) :].sum() < 1e-9
    torch.testing.assert_close(spectrum.U * spectrum.S @ spectrum.V, dense)
    for basis in (spectrum.U.mT, spectrum.V):
        torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis), dtype=torch.float64))
    assert spectrum.energy == pytest.approx(float(dense.square().sum()))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_is_lost_is_the_discarded_singular_values(adapter: LayerWeights, rank: int) -> None:
    dense = adapter.delta()
    found = low(adapter, Cut(rank=rank))
    values = torch.linalg.svdvals(dense.flatten(1))
    lost = values[rank:].norm()
    assert found.weights.rank == rank
    assert float((found.weights.delta() - dense).norm()) == pytest.approx(float(lost), rel=1e-6)
    assert found.error == pytest.approx(float(lost / dense.norm()), rel=1e-6)
    assert found.energy == pytest.approx(1 - found.error**2)


def test_scale_stays(adapter: LayerWeights) -> None:
    found = low(adapter, Cut(rank=2)).weights
    assert found.scale == pytest.approx(adapter.scale if adapter.scale > 0 else 1.0)
    assert torch.allclose(found.up.flatten(1).norm(dim=0), found.down.flatten(1).norm(dim=1))


@pytest.mark.parametrize("rank", [4, 8, 100])
def test_full_rank_changes_no_bit(rank: int) -> None:
    adapter = ADAPTERS["lora"]
    found = low(adapter, Cut(rank=rank))
    assert found.weights is adapter
    assert (found.energy, found.error) == (1.0, 0.0)


def test_full_rank_of_other_kinds_is_exact(adapter: LayerWeights) -> None:
    found = low(adapter, Cut())
    torch.testing.assert_close(found.weights.delta(), adapter.delta().reshape(found.weights.delta().shape))
    assert found.error == 0


def test_ranks_beyond_those_of_the_matrix_go() -> None:
    found = low(ADAPTERS["lora of more ranks than columns"], Cut(rank=20)).weights
    assert found.rank == 9
    torch.testing.assert_close(found.delta(), ADAPTERS["lora of more ranks than columns"].delta())
    assert low(ADAPTERS["lora of more ranks than columns"], Cut(rank=8)).weights.rank == 8


@pytest.mark.parametrize("energy", [0.2, 0.5, 0.9, 0.99])
def test_energy_gives_the_lowest_rank_that_keeps_it(adapter: LayerWeights, energy: float) -> None:
    found = low(adapter, Cut(energy=energy))
    values = torch.linalg.svdvals(adapter.delta().flatten(1)).square()
    shares = values.cumsum(0) / values.sum()
    rank = found.weights.rank
    assert rank is not None
    if found.weights is adapter:
        assert int((shares < energy).sum()) + 1 >= rank
        return
    assert float(shares[rank - 1]) >= energy - 1e-9
    assert rank == 1 or float(shares[rank - 2]) < energy


def test_bounds_together_and_the_ratio() -> None:
    adapter = ADAPTERS["lora"]
    S = spectrum_of(adapter).S
    assert Cut(energy=0.9999, rank=2).rank_of(spectrum_of(adapter)) == 2
    assert Cut(ratio=float(S[0] / S[1]) * 1.01).rank_of(spectrum_of(adapter)) == 2
    assert Cut(ratio=1.0).rank_of(spectrum_of(adapter)) == 1


def test_zeros() -> None:
    adapter = lora_weights(draw(4, 12), torch.zeros(9, 4, dtype=torch.float64))
    found = low(adapter, Cut(rank=2))
    assert found.weights.rank == 2 and not found.weights.delta().any()
    assert (found.energy, found.error) == (1.0, 0.0)
    assert low(adapter, Cut(energy=0.9)).weights.rank == 1


def test_precision_and_magnitudes_stay() -> None:
    magnitude = draw(9).abs().bfloat16()
    adapter = lora_weights(draw(4, 12).bfloat16(), draw(9, 4).bfloat16(), 4.0, magnitude)
    found = low(adapter, Cut(rank=2)).weights
    assert found.down.dtype == found.up.dtype == torch.bfloat16
    assert found.magnitude is magnitude


def low_rank_matrix(rank: int, noise: float, m: int = 700, n: int = 650) -> Tensor:
    return draw(m, rank) @ draw(rank, n) + noise * draw(m, n, seed=5)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_large_matrices_have_their_largest_singular_values(noise: float) -> None:
    """Also where they hardly fall: the error that is said is the LoRA's own then too."""
    matrix = low_rank_matrix(8, noise)
    cut = Cut(rank=8)
    spectrum = spectrum_of_matrix(matrix, cut)
    assert len(spectrum.S) < min(matrix.shape)  # it was not decomposed as a whole
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(spectrum.S[:8], values[:8], rtol=1e-6, atol=0)
    found = kept(spectrum, cut, tuple(matrix.shape))
    error = float((found.weights.delta() - matrix).norm() / matrix.norm())
    assert found.error == pytest.approx(error, rel=1e-6, abs=1e-7)
    assert error == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-6, abs=1e-7)


def test_said_error_is_true_where_nothing_falls() -> None:
    """Noise alone is the worst there is for a randomised method."""
    matrix = draw(700, 650)
    found = kept(spectrum_of_matrix(matrix, Cut(rank=8)), Cut(rank=8), (700, 650))
    error = float((found.weights.delta() - matrix).norm() / matrix.norm())
    assert found.error == pytest.approx(error, rel=1e-9)
    values = torch.linalg.svdvals(matrix)
    assert error == pytest.approx(float(values[8:].norm() / values.norm()), rel=2e-3)


@pytest.mark.parametrize("energy", [0.9, 0.999])
def test_large_matrices_are_searched_until_the_energy_is_there(energy: float) -> None:
    matrix = low_rank_matrix(100, 1e-2)
    found = kept(spectrum_of_matrix(matrix, Cut(energy=energy)), Cut(energy=energy), (700, 650))
    values = torch.linalg.svdvals(matrix).square()
    expected = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    assert found.weights.rank == expected
    assert math.isclose(found.energy, float(values[:expected].sum() / values.sum()), rel_tol=1e-6)
