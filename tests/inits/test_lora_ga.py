"""LoRA-GA: the gradients it sees, the step it prepares, and that it is neither the loss' scale nor the processes'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dreamlora.errors import UserError
from dreamlora.inits import lora_ga
from dreamlora.inits._gradients import SketchPlan, mean_gradient_svd
from dreamlora.inits._start import Probe
from tests.inits.problems import BATCH, BATCHES, RANK, SCALE, loss_of, probe_of, problem, targets_of

EVERYTHING = {"draws": BATCH * BATCHES}
WIDE = 100.0  # oversampling with which the sketch is as wide as every layer here


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


@pytest.mark.parametrize("iterations", [0, 1])
def test_the_decomposed_gradient_is_autograds(iterations):
    """Convolution, a layer that is used twice, and the mean over several batches."""
    made = problem()
    found = mean_gradient_svd(made.targets, made.probe, SketchPlan(BATCH * BATCHES, iterations, WIDE))
    for (U, V), gradient in zip(found, made.mean_gradients(), strict=True):
        core = U.mT @ gradient @ V
        torch.testing.assert_close(core, core.diagonal().diag(), rtol=1e-3, atol=1e-4 * core.abs().max().item())
        torch.testing.assert_close(core.diagonal(), torch.linalg.svdvals(gradient), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("iterations", "share"), [(0, 0.9), (2, 0.999)])
def test_a_narrow_sketch_finds_nearly_all_of_the_leading_part(iterations, share):
    made = problem(rank=1)
    found = mean_gradient_svd(made.targets, made.probe, SketchPlan(BATCH * BATCHES, iterations, 2.0))
    for (U, V), gradient in zip(found, made.mean_gradients(), strict=True):
        assert U.shape[1] == 4
        kept = (U[:, :2].mT @ gradient @ V[:, :2]).norm()
        assert kept >= share * best(gradient, 2).norm()


def test_the_default_decomposition_is_close_to_the_exact_one():
    """A layer of 96 x 96 whose gradient's singular values fall slowly, as i^-1/4: the sketch has 32 of its columns."""
    torch.manual_seed(0)
    rank, size = 8, 96
    net = inject_adapter_in_model(LoraConfig(r=rank, target_modules=["0"]), nn.Sequential(nn.Linear(size, size)))
    U, V = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    gradient = U * torch.arange(1, size + 1) ** -0.25 @ V.mT
    (target,) = targets_of(net)
    # the gradient of sum(G * W x x') for orthonormal inputs is G
    probe = Probe(net, lambda number: (net(torch.eye(size)).mT * gradient).sum(), 1, 0, 1, lambda value: value)
    options = lora_ga.Options(draws=1)
    ((found_U, found_V),) = mean_gradient_svd([target], probe, SketchPlan(1, options.iterations, options.oversampling))
    left, right = found_U[:, rank : 2 * rank], found_V[:, :rank]
    step = left @ left.mT @ gradient + gradient @ right @ right.mT
    ideal = best(gradient, 2 * rank)
    assert float((step * ideal).sum() / step.norm() / ideal.norm()) > 0.95


def test_the_first_step_is_the_best_approximation_of_the_full_gradient():
    made = problem()
    made.start("lora_ga", gamma=4.0, oversampling=WIDE, **EVERYTHING)
    total = sum(loss_of(made.net, batch) for batch in made.batches) / BATCHES
    total.backward()
    rate = 1e-3
    with torch.no_grad():
        for target in made.targets:
            target.A.sub_(rate * target.A.grad)
            target.B.sub_(rate * target.B.grad)
    for change, gradient in zip(made.change(), made.mean_gradients(), strict=True):
        expected = -rate * SCALE**2 * gradient.shape[0] ** 0.5 / 4.0 * best(gradient, 2 * RANK)
        torch.testing.assert_close(change, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def test_the_factors_are_scaled_alike_and_use_other_directions():
    for start in problem().start("lora_ga", gamma=9.0, **EVERYTHING):
        size = start.B.shape[0] ** 0.25 / 3.0
        torch.testing.assert_close(start.A @ start.A.mT, size**2 * torch.eye(RANK), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(start.B.mT @ start.B, size**2 * torch.eye(RANK), rtol=1e-4, atol=1e-5)


def authors_clip(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the largest entry of s B A is above that of W₀, both factors shrink by the root of what is too much."""
    ratio = weight.abs().max() / (SCALE * B @ A).abs().max()
    return (A * ratio**0.5, B * ratio**0.5) if ratio < 1 else (A, B)


@pytest.mark.parametrize("gamma", [0.01, 6.0, 1e4])
def test_the_norm_clip_is_the_authors(gamma):
    """A small gamma is a large start: all layers are clipped at the first, some at the second, none at the last."""
    made = problem()
    weights = [target.weight() for target in made.targets]
    free = problem().start("lora_ga", gamma=gamma, **EVERYTHING)
    clipped = made.start("lora_ga", gamma=gamma, norm_clip=True, **EVERYTHING)
    expected = [authors_clip(weight, start.A, start.B) for weight, start in zip(weights, free, strict=True)]
    for start, (A, B), weight in zip(clipped, expected, weights, strict=True):
        torch.testing.assert_close(start.A, A)
        torch.testing.assert_close(start.B, B)
        assert (SCALE * start.B @ start.A).abs().max() <= weight.abs().max() * (1 + 1e-5)
    changed = sum(not torch.equal(one.A, other.A) for one, other in zip(clipped, free, strict=True))
    assert changed == {0.01: 3, 6.0: 2, 1e4: 0}[gamma]


def test_a_clipped_start_leaves_the_model_unchanged():
    made = problem()
    made.start("lora_ga", gamma=0.01, norm_clip=True, **EVERYTHING)
    assert torch.equal(made.net(made.batches[0]), made.base(made.batches[0]))


def test_a_weight_of_zeros_cannot_be_clipped_to_and_is_named_before_any_pass():
    made = problem()
    made.net.get_submodule("square").base_layer.weight.data.zero_()
    made.probe = replace(made.probe, loss=lambda number: pytest.fail("a pass was made"))
    with pytest.raises(UserError, match=r"norm_clip: the weight of square is zero"):
        made.start("lora_ga", norm_clip=True, **EVERYTHING)


def test_the_scale_of_the_loss_does_not_matter():
    plain, made = problem(), problem()
    made.probe = replace(made.probe, loss=lambda number: 1e-3 * loss_of(made.net, made.batches[number]))
    for one, other in zip(plain.start("lora_ga", **EVERYTHING), made.start("lora_ga", **EVERYTHING), strict=True):
        torch.testing.assert_close(one.B @ one.A, other.B @ other.A, rtol=1e-3, atol=1e-4)


def test_processes_share_the_draws():
    """Two processes one after another: each is told the other's sums of the same pass."""
    whole = problem()
    expected = [s.B @ s.A for s in whole.start("lora_ga", attach=False, **EVERYTHING)]
    made = problem()
    made.probe = probe_of(made.net, made.batches)
    sums: list[torch.Tensor] = []
    from dreamlora.inits import _gradients

    def both(targets, probe, plan, factors, *, transposed=False):
        sums.clear()
        original(targets, probe_of(made.net, made.batches, 0, 2, keep), plan, factors, transposed=transposed)
        mine = iter(list(sums))
        second = probe_of(made.net, made.batches, 1, 2, lambda value: value + next(mine))
        return original(targets, second, plan, factors, transposed=transposed)

    def keep(value):
        sums.append(value)
        return value

    original = _gradients._gradient_times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gradients, "_gradient_times", both)
        found = made.start("lora_ga", attach=False, **EVERYTHING)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.B @ one.A, other, rtol=1e-3, atol=1e-4)


def test_each_process_computes_its_own_batches_alone():
    seen = {0: [], 1: []}
    for rank, numbers in seen.items():
        made = problem()
        probe = probe_of(made.net, made.batches, rank, 2)
        made.probe = replace(probe, loss=lambda n, numbers=numbers, inner=probe.loss: numbers.append(n) or inner(n))
        made.start("lora_ga", iterations=0, **EVERYTHING)
    assert seen == {0: [0, 2] * 2, 1: [1, 3] * 2}


def test_hooks_and_gradients_are_gone_afterwards():
    made = problem()
    made.start("lora_ga", **EVERYTHING)
    assert not any(module._forward_hooks for module in made.net.modules())
    assert all(parameter.grad is None for parameter in made.net.parameters())


def test_a_gradient_that_is_not_finite_is_an_error():
    made = problem()
    made.batches[1].fill_(float("nan"))
    with pytest.raises(UserError, match=r"--init lora_ga: the gradient of conv is not finite"):
        made.start("lora_ga", **EVERYTHING)
