"""Every init against its formula, computed another way."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tests.inits.problems import RANK, SCALE, problem


def weights(made) -> list[torch.Tensor]:
    return [made.base.get_submodule(target.name).weight.detach().flatten(1) for target in made.targets]


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def test_gaussian_has_a_deviation_of_one_over_rank():
    starts = problem(rank=40).start("gaussian")
    values = torch.cat([start.A.flatten() for start in starts])
    assert math.isclose(values.std(), 1 / 40, rel_tol=0.05)
    assert not any(start.B.any() for start in starts)


def test_kaiming_is_uniform_within_the_root_of_the_inputs():
    for start in problem(rank=200).start("kaiming"):
        bound = start.A.shape[1] ** -0.5
        assert start.A.abs().max() <= bound
        assert math.isclose(start.A.std(), bound / math.sqrt(3), rel_tol=0.06)
        assert not start.B.any()


def test_pissa_holds_the_largest_singular_triplets_in_equal_parts():
    made = problem()
    for start, weight in zip(made.start("pissa"), weights(made), strict=True):
        torch.testing.assert_close(SCALE * start.B @ start.A, best(weight, RANK), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(start.B.mT @ start.B, start.A @ start.A.mT, rtol=1e-4, atol=1e-5)


def test_fast_pissa_nearly_does():
    made = problem()
    for start, weight in zip(made.start("pissa", niter=16), weights(made), strict=True):
        assert SCALE * (start.B @ start.A).norm() > 0.98 * best(weight, RANK).norm()


def test_olora_holds_the_first_part_of_the_qr_decomposition():
    made = problem()
    for start, weight in zip(made.start("olora"), weights(made), strict=True):
        torch.testing.assert_close(start.B.mT @ start.B, torch.eye(RANK))
        # Q[:, :r] Q[:, :r]ᵀ W, that is: exact in the first r columns of W
        torch.testing.assert_close((start.B @ start.A)[:, :RANK], weight[:, :RANK])
        torch.testing.assert_close(start.B @ start.A, start.B @ (start.B.mT @ weight))


def test_orthogonal_uses_other_halves_of_the_rank():
    for start in problem(rank=4).start("orthogonal"):
        torch.testing.assert_close(start.B @ start.A, torch.zeros(len(start.B), start.A.shape[1]), atol=1e-7, rtol=0)
        assert torch.linalg.matrix_rank(start.A) == torch.linalg.matrix_rank(start.B) == 2


def test_nora_is_a_sketch_of_the_weight():
    made = problem()
    for start, weight in zip(made.start("nora", sigma=0.5), weights(made), strict=True):
        # in the row space of W: projecting on it changes nothing
        projected = start.A @ torch.linalg.pinv(weight) @ weight
        torch.testing.assert_close(projected, start.A, rtol=1e-3, atol=1e-5)
        assert not start.B.any()


def test_the_rows_of_nora_have_the_documented_size():
    made = problem()
    ratios = []
    for seed in range(200):
        made.targets = [replace(target, key=(seed, target.name)) for target in made.targets]
        for start, weight in zip(made.start("nora", sigma=0.5), weights(made), strict=True):
            ratios.append(start.A.square().sum(1).mean() / weight.square().sum())
    assert math.isclose(torch.stack(ratios).mean() ** 0.5, 0.5 / SCALE, rel_tol=0.05)


def test_orthonormalized_nora_keeps_span_and_size():
    plain, made = problem().start("nora"), problem()
    for start, other in zip(made.start("nora", orthonormalize=True), plain, strict=True):
        gram = start.A @ start.A.mT
        torch.testing.assert_close(gram, torch.eye(RANK) * gram[0, 0], rtol=1e-4, atol=1e-8)
        assert math.isclose(start.A.norm(), other.A.norm(), rel_tol=1e-5)
        assert torch.linalg.matrix_rank(torch.cat([start.A, other.A]), rtol=1e-4) == RANK


def test_eva_holds_the_principal_components_of_the_inputs():
    made = problem()
    made.targets = [target for target in made.targets if target.name == "out"]
    seen = []
    handle = made.base.out.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].flatten(0, 1)))
    for batch in made.batches:
        made.base(batch)
    handle.remove()
    [start] = made.start("eva", draws=12, tau=0.99)
    inputs = torch.cat(seen)
    V = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False).Vh[:RANK]
    torch.testing.assert_close(start.A @ start.A.mT, torch.eye(RANK), rtol=1e-4, atol=1e-4)
    assert torch.linalg.svdvals(start.A @ V.mT).min() > 0.98
    assert not start.B.any()
