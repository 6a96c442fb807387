"""``damping_mode absolute``: the steps of the programs that came with arXiv 2402.02347, each written out here anew.

Read at commit c3a2c1b of pilancilab/Riemannian_Preconditioned_LoRA. Four programs have an optimizer class each; those
for GPT-2, Mistral and Mix-of-Show differ in the bias correction alone (on for GPT-2).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dreamlora import registry
from dreamlora.optimizers import ScaledAdamW, ScaledGD
from tests.optimizers.lora_problems import Pairs, descend, make_pairs, pair_group, quadratic_gradients, targets
from tests.optimizers.test_scaled import factors


def dreambooth(
    pairs: Pairs,
    wanted: list[Tensor],
    steps: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    wd: float,
    reg: float,
) -> list[Tensor]:
    """Both inverses at the same point, none of a Gram matrix of at most 1e-6; Adam with corrected moments; decay."""
    ends = []
    for (A, B), W in zip(pairs, wanted, strict=True):
        now = [A.detach().clone(), B.detach().clone()]
        first, second = [0.0, 0.0], [0.0, 0.0]
        eye = torch.eye(len(A), dtype=A.dtype)
        for t in range(1, steps + 1):
            a, b = now
            G = b @ a - W
            K_of_b, K_of_a = b.T @ b, a @ a.T
            P = [torch.linalg.inv(K + reg * eye) if K.norm() > 1e-6 else eye for K in (K_of_b, K_of_a)]
            for i, g in enumerate((P[0] @ (b.T @ G), (G @ a.T) @ P[1])):
                first[i] = betas[0] * first[i] + (1 - betas[0]) * g
                second[i] = betas[1] * second[i] + (1 - betas[1]) * g**2
                mean, square = first[i] / (1 - betas[0] ** t), second[i] / (1 - betas[1] ** t)
                now[i] = now[i] - lr * mean / (square.sqrt() + eps)
                now[i] = now[i] - lr * wd * now[i]
        ends += now
    return ends


def language(
    pairs: Pairs,
    wanted: list[Tensor],
    steps: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    wd: float,
    reg: float,
    correct_bias: bool,
) -> list[Tensor]:
    """A first, then B scaled by the new A; eps beside the root of the moment as it is, the correction in the rate."""
    ends = []
    for (A, B), W in zip(pairs, wanted, strict=True):
        now = {"a": A.detach().clone(), "b": B.detach().clone()}
        first, second = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
        eye = torch.eye(len(A), dtype=A.dtype)
        for t in range(1, steps + 1):
            G = now["b"] @ now["a"] - W
            gradients = {"a": now["b"].T @ G, "b": G @ now["a"].T}
            for x in "ab":
                if x == "a":
                    g = torch.linalg.inv(now["b"].T @ now["b"] + reg * eye) @ gradients["a"]
                else:
                    g = gradients["b"] @ torch.linalg.inv(now["a"] @ now["a"].T + reg * eye)
                first[x] = betas[0] * first[x] + (1 - betas[0]) * g
                second[x] = betas[1] * second[x] + (1 - betas[1]) * g * g
                rate = lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) if correct_bias else lr
                now[x] = now[x] - rate * first[x] / (second[x].sqrt() + eps)
                now[x] = now[x] - lr * wd * now[x]
        ends += [now["a"], now["b"]]
    return ends


PROGRAMS = {
    "DreamBooth": (dreambooth, {"bias_correction": "torch", "unscaled_below": 1e-6}, {}, 1e-8),
    "GPT-2": (language, {"bias_correction": "folded", "order": "gauss_seidel"}, {"correct_bias": True}, 1e-6),
    "Mix-of-Show": (language, {"bias_correction": "none", "order": "gauss_seidel"}, {"correct_bias": False}, 1e-6),
}
"""Reference, the options that are to equal it, its own settings, its eps."""
each = pytest.mark.parametrize("program", PROGRAMS)


def both(program: str, pairs: Pairs, steps: int, reg: float, **settings) -> tuple[list[Tensor], list[Tensor]]:
    """Where the program's step and ours lead; the pairs are trained."""
    reference, options, own, eps = PROGRAMS[program]
    settings = {"lr": 0.01, "betas": (0.9, 0.98), "eps": eps, **settings}
    expected = reference(pairs, targets(pairs), steps, **settings, **own, wd=0.1, reg=reg)
    group = pair_group(pairs)
    descend(
        pairs,
        ScaledAdamW([group], **settings, weight_decay=0.1, damping=reg, damping_mode="absolute", **options),
        steps,
    )
    return factors(pairs), expected


def assert_close(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=rtol, atol=1e-11)


@each
@pytest.mark.parametrize("zero_B", [False, True])
@pytest.mark.parametrize("steps", [1, 50])
def test_the_step_is_the_programs(program, zero_B, steps):
    assert_close(*both(program, make_pairs(zero_B=zero_B), steps, reg=0.3))


@each
@pytest.mark.parametrize("reg", [1e6, 1e8])
def test_also_where_the_published_damping_leaves_the_work_to_eps(program, reg):
    assert_close(*both(program, make_pairs(zero_B=True), 50, reg=reg), rtol=1e-7)


@each
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_ascent_are_those_of_the_same_step(program, maximize, dtype):
    _, options, _, eps = PROGRAMS[program]
    ends = []
    for kind in (torch.float64, dtype):
        pairs = make_pairs(dtype=dtype)
        pairs = [tuple(torch.nn.Parameter(p.detach().to(kind)) for p in pair) for pair in pairs]
        optimizer = ScaledAdamW(
            [pair_group(pairs)],
            lr=torch.tensor(0.02),
            eps=eps,
            damping=0.3,
            damping_mode="absolute",
            maximize=maximize,
            **options,
        )
        descend(pairs, optimizer, 3)
        ends.append([p.double() for p in factors(pairs)])
    for one, other in zip(*ends, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def first_step_of_B(**options) -> Tensor:
    """With a damping so large that eps rules: then B moves along its gradient."""
    pairs = make_pairs(zero_B=True)
    settings = {"lr": 1.0, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    descend(pairs, ScaledAdamW([pair_group(pairs)], **settings, damping=1e12, damping_mode="absolute", **options), 1)
    return torch.cat([B.detach().flatten() for _, B in pairs])


def test_the_first_steps_of_the_programs_differ_by_the_bias_correction_of_eps():
    """1/(1 − β₁) and 1/√(1 − β₂): 10 and 31.6 times."""
    torch_s, folded, none = (first_step_of_B(bias_correction=name) for name in ("torch", "folded", "none"))
    torch.testing.assert_close(torch_s, folded * (1 - 0.999) ** -0.5, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch_s, none * 10, rtol=1e-3, atol=0)


def test_the_default_correction_is_that_of_the_program_for_diffusion():
    assert torch.equal(first_step_of_B(), first_step_of_B(bias_correction="torch"))


def test_the_papers_damping_of_a_million_is_adamw_with_a_large_eps():
    """With λ = 1e6, (K + λI)⁻¹ is 1e-6 in every direction: eps 1e-8 of what it leaves is 1e-2 of the gradient."""
    ours, theirs = make_pairs(zero_B=True), make_pairs(zero_B=True)
    settings = {"lr": 0.02, "betas": (0.9, 0.999), "weight_decay": 0.0}
    descend(ours, ScaledAdamW([pair_group(ours)], **settings, eps=1e-8, damping=1e6, damping_mode="absolute"), 8)
    descend(theirs, torch.optim.AdamW([p for pair in theirs for p in pair], **settings, eps=1e-2), 8)
    assert_close(factors(ours), factors(theirs), rtol=1e-3)


def test_small_factors_leave_the_gradient_unscaled_as_long_as_the_program_does():
    """At this rate ``‖BᵀB‖`` passes 1e-6 in the middle of the run; without the option A goes elsewhere."""
    found, expected = both("DreamBooth", make_pairs(zero_B=True), 80, reg=1e6, lr=1e-5)
    assert_close(found, expected)
    pairs, start = make_pairs(zero_B=True), make_pairs(zero_B=True)
    settings = {"lr": 1e-5, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    descend(pairs, ScaledAdamW([pair_group(pairs)], **settings, damping=1e6, damping_mode="absolute"), 80)
    for (A, _), (A0, _), wanted in zip(pairs, start, expected[::2], strict=True):
        assert (A - wanted).norm() > 0.2 * (A0 - wanted).norm()


def test_what_is_left_unscaled_is_no_failed_inversion():
    pairs = make_pairs(zero_B=True)
    quadratic_gradients(pairs, targets(pairs))
    optimizer = ScaledGD([pair_group(pairs)], damping=0.0, damping_mode="absolute", unscaled_below=1e-6)
    optimizer.step()
    assert optimizer.stats == {"fallbacks": 0}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"bias_correction": "folded"}, ("bias_correction", "damping_mode 'relative'")),
        ({"bias_correction": "none"}, ("bias_correction", "damping_mode 'relative'")),
        ({"bias_correction": "none", "variant": "split"}, ("bias_correction", "damping_mode 'relative'")),
        ({"unscaled_below": 1e-6}, ("unscaled_below", "damping_mode 'relative'")),
        (
            {"unscaled_below": 1e-6, "damping_mode": "absolute", "geometry": "tangent"},
            ("unscaled_below", "geometry 'tangent'"),
        ),
        (
            {"unscaled_below": 1e-6, "damping_mode": "absolute", "transport_momentum": True},
            ("unscaled_below", "transport_momentum True"),
        ),
    ],
)
def test_what_means_nothing_together_is_refused(options, names):
    for make in (
        lambda: ScaledAdamW([pair_group(make_pairs())], **options),
        lambda: ScaledAdamW([pair_group(make_pairs(), **options)]),
        lambda: registry.load("optimizers", "scaled_adamw").Options(**options),
    ):
        with pytest.raises(ValueError, match=rf"{names[0]}: got .*{names[1]}, must be"):
            make()


@pytest.mark.parametrize(("mode", "meant"), [("relative", "torch"), ("absolute", "folded")])
def test_a_state_of_an_earlier_version_goes_on_as_it_was(mode, meant):
    """They had no such options; absolute damping was GPT-2's."""
    pairs = make_pairs()
    first = ScaledAdamW([pair_group(pairs)], damping_mode=mode, bias_correction=meant)
    descend(pairs, first, 2)
    state = copy.deepcopy(first.state_dict())
    for group in state["param_groups"]:
        del group["bias_correction"], group["unscaled_below"]
    second = ScaledAdamW([pair_group(pairs)], damping_mode=mode)
    second.load_state_dict(state)
    assert second.param_groups[0]["bias_correction"] == meant
    assert second.param_groups[0]["unscaled_below"] == 0.0
