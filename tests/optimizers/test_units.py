"""Start-normalised units: alpha and the scale of the start drop out of every optimizer's path."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamlora import registry
from dreamlora.optimizers import LoRAMuon, ScaledAdamW, grad_norm, in_units, lora_param_groups
from dreamlora.optimizers._units import measure_start, scaling_in_units, unit_scales
from tests.optimizers.test_plugins import load

NAMES = registry.names("optimizers")
FREE = [name for name in NAMES if getattr(registry.load("optimizers", name), "UNITS_FREE", False)]
IN_UNITS = sorted(set(NAMES) - set(FREE))
RATES = {"adafactor": 0.1, "prodigy": 1.0, "sgd": 0.5, "scaled_gd": 0.5}
"""In units of the start; others take 3e-2."""
SETTINGS = {"prodigy": {"d0": 1e-2}}
SHAPES = ((10, 7), (10, 7), (6, 12), (5, 9))  # (m, n)
STEPS = 6


class Adapted(nn.Module):
    """A layer with LoRA of another maker's: names tell the pair, and "alpha" the scaling."""

    def __init__(self, m: int, n: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_down, self.lora_up = nn.Linear(n, rank, bias=False), nn.Linear(rank, m, bias=False)
        self.bias = nn.Parameter(torch.zeros(m))
        self.alpha, self.rank = alpha, rank

    @property
    def update(self) -> Tensor:
        return self.alpha / self.rank * self.lora_up.weight @ self.lora_down.weight

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_down.weight, self.lora_up.weight


class Net(nn.Module):
    """Layers that are to become random matrices."""

    def __init__(
        self, alpha: float = 2.0, start: float = 1.0, rank: int = 3, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(Adapted(m, n, rank, alpha) for m, n in SHAPES)
        self.wanted = [torch.randn(m, n, generator=generator, dtype=torch.float64) for m, n in SHAPES]
        for layer in self.layers:
            A, B = layer.factors
            A.data = start * torch.randn(A.shape, generator=generator, dtype=torch.float64)
            B.data = torch.zeros(B.shape, dtype=torch.float64)
        self.to(dtype)

    def loss(self) -> Tensor:
        errors = [layer.update - W.to(layer.update) for layer, W in zip(self.layers, self.wanted, strict=True)]
        biases = [(layer.bias - 1).square().sum() for layer in self.layers]
        return 0.5 * sum(error.square().sum() for error in errors) + sum(biases)

    def updates(self) -> list[Tensor]:
        return [layer.update.detach().double() for layer in self.layers]

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.parameters()]


def backward(net: Net) -> Tensor:
    net.zero_grad()
    loss = net.loss()
    loss.backward()
    return loss


def built(name: str, net: Net, units: str = "start", **settings: Any) -> Any:
    plugin = load(name)
    groups = lora_param_groups(net, lr=RATES.get(name, 3e-2), weight_decay=0.1, units=units)
    optimizer = plugin.build(groups, plugin.Options(**SETTINGS.get(name, {}), **settings))
    return optimizer if units == "plain" else in_units(optimizer)


def trained(net: Net, optimizer: Any, steps: int = STEPS) -> list[Tensor]:
    """All updates after every step."""
    path: list[Tensor] = []
    for _ in range(steps):
        backward(net)
        optimizer.step()
        path += net.updates()
    return path


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        *((name, {}) for name in IN_UNITS),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        *(("adamw", {"amsgrad": True, "fused": fused}) for fused in (True, False)),
        ("scaled_adamw", {"variant": "split", "scale_correction": True}),
        ("scaled_adamw", {"geometry": "tangent", "transport_momentum": True}),
        ("scaled_adamw", {"geometry": "balanced"}),
        ("scaled_adamw", {"damping_mode": "absolute", "damping": 1e-2, "order": "gauss_seidel"}),
        ("scaled_gd", {"momentum": 0.9, "variant": "split", "scale_correction": True}),
    ],
    ids=str,
)
def test_alpha_and_the_scale_of_the_start_change_the_path_by_rounding_alone(settings: tuple[str, Any]) -> None:
    name, options = settings
    usual = Net()
    path = trained(usual, built(name, usual, **options))
    # Newton-Schulz in bfloat16, and signs of what is nearly zero
    tolerance = {"muon": 1e-2, "adamw8bit": 1e-3}.get(name, 1e-9)
    for alpha, start in ((16.0, 1.0), (2.0, 10.0), (16.0, 0.1)):
        net = Net(alpha, start)
        assert distance(trained(net, built(name, net, **options)), path) < tolerance, (alpha, start)
    assert distance(path[-4:], path[:4]) > 0.5


def test_in_plain_units_they_do_not_drop_out() -> None:
    for alpha, start in ((16.0, 1.0), (2.0, 10.0)):
        usual, net = Net(), Net(alpha, start)
        assert distance(*(trained(each, built("adamw", each, units="plain")) for each in (net, usual))) > 0.1


@pytest.mark.parametrize("name", FREE)
def test_what_is_free_of_units_does_the_same_in_both(name: str) -> None:
    nets = Net(), Net(16.0)
    plain, start = (trained(net, built(name, net, units=u)) for net, u in zip(nets, ("plain", "start"), strict=True))
    assert distance(plain, start) < 1e-6


def test_the_formula() -> None:
    """``c_A = σ√n r^-½``, ``c_B = r^-½ / (s σ√n)``; a convolution's n are the entries of its kernels."""
    for rank in (4, 64):
        for alpha in (1.0, float(rank)):
            A, B = 0.02 * torch.randn(rank, 5, 3, 3), torch.zeros(7, rank, 1, 1)
            s = alpha / rank
            length = float(A.square().mean().sqrt()) * math.sqrt(45)
            c_A, c_B = unit_scales(A, B, s)
            assert c_A == pytest.approx(length / math.sqrt(rank), rel=1e-5)
            assert c_B == pytest.approx(1 / (math.sqrt(rank) * s * length), rel=1e-5)
            # rows of Ã have length √r, so that r (ηt)² s c_A c_B, how far W has come after t steps, knows no rank
            assert float((A / c_A).flatten(1).square().sum(1).mean()) == pytest.approx(rank, rel=1e-5)
            assert scaling_in_units(s, c_A, c_B) == pytest.approx(1 / rank, rel=1e-8)
            assert unit_scales(A, B, -s) == (c_A, c_B) and scaling_in_units(-s, c_A, c_B) == pytest.approx(-1 / rank)


def test_adamw_moves_the_weight_alike_at_every_rank() -> None:
    """While the factors outgrow their start the weight moves by η², whatever the rank."""
    sizes = []
    for rank in (4, 64):
        A, B = nn.Parameter(torch.randn(rank, 256) / 16), nn.Parameter(torch.zeros(256, rank))
        c_A, c_B = unit_scales(A, B, 1.0)
        group = {"params": [A, B], "lora_pairs": True, "unit_scales": [c_A, c_B]}
        optimizer = in_units(torch.optim.AdamW([group], lr=1.0, weight_decay=0.0))
        for _ in range(20):
            G = torch.ones(256, 256)
            A.grad, B.grad = B.detach().T @ G + 1e-9, G @ A.detach().T
            optimizer.step()
        sizes.append(float((B @ A).abs().mean()))
    assert sizes[0] / sizes[1] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("A", "B", "scaling", "scales"),
    [
        (0.0, 0.0, 1.0, (1, 1)),
        (1.0, 0.0, 0.0, (1, 1)),
        (0.0, 1.0, 1.0, (1 / math.sqrt(12), math.sqrt(12) / 2)),  # the other way round: B is what starts
        (1.0, 5.0, 1.0, (math.sqrt(6) / 2, 1 / math.sqrt(6))),  # A alone, wherever it starts (PiSSA, LoRA-GA)
    ],
)
def test_starts_without_length(A: float, B: float, scaling: float, scales: tuple[float, float]) -> None:
    found = unit_scales(torch.full((2, 3), A), torch.full((6, 2), B), scaling)
    assert found == pytest.approx(scales)


@pytest.mark.parametrize("scaling", [1.0, 0.0])
def test_a_pair_without_effect_trains_on_without_numbers_that_are_none(scaling: float) -> None:
    net = Net(alpha=3 * scaling, start=0.0)
    optimizer = built("adamw", net)
    trained(net, optimizer, 2)
    assert all(p.isfinite().all() for p in net.parameters())


def foreign(net: Net, **settings: Any) -> torch.optim.Optimizer:
    """As the documents say."""
    return in_units(torch.optim.AdamW(lora_param_groups(net, lr=4e-2, units="start"), **settings))


def test_a_foreign_project_takes_torchs_adamw() -> None:
    usual, net = Net(), Net(16.0, 10.0)
    path = trained(usual, foreign(usual))
    assert distance(trained(net, foreign(net)), path) < 1e-9
    assert isinstance(foreign(net), torch.optim.AdamW)
    # by hand: two learning rates; eps is in these units too, and the decay is the same for both
    by_hand = Net()
    groups = []
    for layer in by_hand.layers:
        scales = unit_scales(*layer.factors, layer.alpha / layer.rank)
        groups += [
            {"params": [p], "lr": 4e-2 * c, "weight_decay": 1e-2 / c, "eps": 1e-8 / c}
            for p, c in zip(layer.factors, scales, strict=True)
        ]
    assert distance(trained(by_hand, torch.optim.AdamW(groups)), path) < 1e-9


def test_other_parameters_are_left_to_the_optimizer() -> None:
    one, other = Net(), Net(16.0)
    biases = []
    for net, units in ((one, "start"), (other, "plain")):
        groups = lora_param_groups(net, lr=1e-2, units=units)
        assert [("unit_scales" in group) for group in groups] == [units == "start", False]
        trained(net, in_units(torch.optim.AdamW(groups)) if units == "start" else torch.optim.AdamW(groups))
        biases.append([layer.bias.detach().clone() for layer in net.layers])
    assert all(map(torch.equal, *biases))


def test_the_rate_of_B_is_still_its_ratio() -> None:
    """LoRA+: A and B in groups of their own have their own scales."""
    net = Net()
    optimizer = built("lora_plus", net, ratio=4.0)
    (of_A, of_B, _) = optimizer.param_groups
    backward(net)
    before = [p.detach().clone() for p in (*of_A["params"], *of_B["params"])]
    optimizer.step()
    scales = [*of_A["unit_scales"], *of_B["unit_scales"]]
    lr, decay = 3e-2, 0.1
    for p, old, c, ratio in zip([*of_A["params"], *of_B["params"]], before, scales, [1] * 4 + [4] * 4, strict=True):
        moved = (p.detach() - old * (1 - lr * ratio * decay)).abs()
        assert float(moved.max()) == pytest.approx(lr * ratio * c, rel=1e-3) or not p.grad.any()


@pytest.mark.parametrize("name", IN_UNITS)
def test_gradients_are_as_before_and_what_has_none_is_untouched(name: str) -> None:
    net = Net(dtype=torch.float32)
    optimizer = built(name, net)
    resting = [net.layers[0].lora_down.weight, net.layers[1].lora_up.weight, *net.layers[2].factors]
    for p in net.parameters():  # away from zero
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    before = [p.detach().clone() for p in resting]
    for _ in range(3):
        backward(net)
        for p in resting:
            p.grad = None
        gradients = {p: p.grad.clone() for p in net.parameters() if p.grad is not None}
        optimizer.step()
        for p, gradient in gradients.items():
            if name not in ("peft_riemannian", "schedulefree_adamw"):  # these change gradients themselves
                torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=0)
    assert all(map(torch.equal, before, (p.detach() for p in resting)))


def test_a_partner_without_gradient_is_seen_in_units() -> None:
    paths = []
    for alpha, start in ((2.0, 1.0), (16.0, 10.0)):
        net = Net(alpha, start)
        optimizer = built("scaled_adamw", net, variant="split")
        path = trained(net, optimizer, 2)
        for _ in range(2):
            backward(net)
            for layer in net.layers:
                layer.lora_up.weight.grad = None
            optimizer.step()
            path += net.updates()
        paths.append(path)
    assert distance(*paths) < 1e-9


@pytest.mark.parametrize("name", ["adamw", "scaled_adamw", "lion", "prodigy"])
def test_a_closure_finds_the_usual_parameters(name: str) -> None:
    called, usual = Net(16.0), Net(16.0)
    optimizer = built(name, called)
    losses = [float(optimizer.step(lambda: backward(called))) for _ in range(3)]
    expected, optimizer = [], built(name, usual)
    for _ in range(3):
        expected.append(float(backward(usual)))
        optimizer.step()
    assert losses == expected
    assert all(map(torch.equal, called.updates(), usual.updates()))


def test_a_step_that_fails_leaves_the_usual_parameters() -> None:
    class Failing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("out of memory")

    net = Net(16.0)
    optimizer = in_units(Failing(lora_param_groups(net, lr=1.0, units="start")))
    before = [p.detach().clone() for p in net.parameters()]
    backward(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old)


@pytest.mark.parametrize("name", IN_UNITS)
def test_a_state_goes_on_from_trained_factors_to_the_last_bit(name: str) -> None:
    """The scales are those of the start, not of the factors that the optimizer was made for."""
    net = Net(16.0, dtype=torch.float32)
    optimizer = built(name, net)
    trained(net, optimizer, 3)
    fresh = copy.deepcopy(net)
    other = built(name, fresh)
    assert other.param_groups[0]["unit_scales"] != optimizer.param_groups[0]["unit_scales"]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["unit_scales"] == optimizer.param_groups[0]["unit_scales"]
    assert all(map(torch.equal, trained(net, optimizer, 3), trained(fresh, other, 3)))


@pytest.mark.parametrize("make", [foreign, lambda net: built("adamw", net), lambda net: built("scaled_adamw", net)])
def test_states_of_other_units_are_refused(make: Callable[[Net], Any]) -> None:
    net = Net()
    optimizer = make(net)
    trained(net, optimizer, 2)
    saved = optimizer.state_dict()
    plain = copy.deepcopy(saved)
    del plain["param_groups"][0]["unit_scales"]
    with pytest.raises(ValueError, match="written in plain units, and this is in units of the start"):
        make(Net()).load_state_dict(plain)
    for wrong in ([1.0], [0.0] * 8, [math.nan] * 8, ["1"] * 8, None):
        damaged = copy.deepcopy(saved)
        damaged["param_groups"][0]["unit_scales"] = wrong
        with pytest.raises(ValueError, match="unit_scales"):
            make(Net()).load_state_dict(damaged)


@pytest.mark.parametrize("name", ["adamw", "scaled_adamw"])
def test_a_state_in_units_is_refused_by_plain_optimizers(name: str) -> None:
    net = Net()
    optimizer = built(name, net)
    trained(net, optimizer, 2)
    plugin = registry.load("optimizers", name)
    plain = plugin.build(lora_param_groups(Net()), plugin.Options())
    with pytest.raises(ValueError, match="written in units of the start, and this is in plain"):
        plain.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", ["adafactor", "adamw", "scaled_adamw", "schedulefree_adamw", "sgd"])
def test_copies_work_in_units_too(name: str, copied: Callable[..., Any]) -> None:
    net = Net(16.0)
    optimizer = built(name, net)
    trained(net, optimizer, 2)
    net, optimizer = copied((net, optimizer))
    path = trained(net, optimizer, 2)
    usual = Net()
    assert distance(path, trained(usual, built(name, usual), 4)[-len(path) :]) < 1e-9
    plain = copy.deepcopy(optimizer.state_dict())
    for group in plain["param_groups"]:
        group.pop("unit_scales", None)
    with pytest.raises(ValueError, match="written in plain units"):
        optimizer.load_state_dict(plain)


def test_schedule_free_switches_in_units() -> None:
    averages = []
    for alpha, start in ((2.0, 1.0), (16.0, 10.0)):
        net = Net(alpha, start)
        optimizer = built("schedulefree_adamw", net)
        path = []
        for _ in range(4):
            path += trained(net, optimizer, 1)
            before = net.updates()
            optimizer.eval()
            path += net.updates()
            assert len(path) == 8 or distance(net.updates(), before) > 1e-3
            optimizer.train()
            assert distance(net.updates(), before) < 1e-12
        averages.append(path)
    assert distance(*averages) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scaled_without_rounding(dtype: torch.dtype) -> None:
    net = Net(16.0, dtype=dtype)
    optimizer = in_units(torch.optim.SGD(lora_param_groups(net, lr=0.0, weight_decay=0.0, units="start")))
    assert all(math.log2(c).is_integer() for c in optimizer.param_groups[0]["unit_scales"])
    backward(net)
    before = [*(p.detach().clone() for p in net.parameters()), *net.gradients()]
    optimizer.step()
    assert all(map(torch.equal, before, [*(p.detach() for p in net.parameters()), *net.gradients()]))


def test_a_thousand_steps_in_units_are_no_drift() -> None:
    """Rounding to and fro wanders, and does not add up."""
    net = Net(16.0, dtype=torch.float32)
    trained(net, foreign(net), 3)
    optimizer = in_units(torch.optim.SGD(lora_param_groups(net, lr=0.0, weight_decay=0.0, units="start")))
    before = [p.detach().clone() for p in net.parameters()]
    backward(net)
    for _ in range(1000):
        optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=1e-6, atol=0)


def test_gradients_are_clipped_in_units() -> None:
    norms, paths = [], []
    for alpha, start in ((2.0, 1.0), (16.0, 10.0)):
        net = Net(alpha, start)
        optimizer = in_units(torch.optim.SGD(lora_param_groups(net, lr=1.0, units="start")))
        path: list[Tensor] = []
        for _ in range(4):
            backward(net)
            norm = grad_norm(net.parameters(), optimizer)
            torch.nn.utils.clip_grads_with_norm_(net.parameters(), 0.5, norm)
            torch.testing.assert_close(grad_norm(net.parameters(), optimizer), norm.new_tensor(0.5), rtol=1e-5, atol=0)
            optimizer.step()
            norms.append(float(norm))
            path += net.updates()
        paths.append(path)
    assert norms[:4] == pytest.approx(norms[4:], rel=1e-9)
    assert distance(*paths) < 1e-9


def test_without_units_the_norm_is_torchs() -> None:
    net = Net()
    backward(net)
    norm = grad_norm(net.parameters(), torch.optim.SGD(lora_param_groups(net), lr=1.0))
    assert torch.equal(norm, torch.nn.utils.get_total_norm(net.gradients()))


def test_the_start_can_be_measured_anew() -> None:
    """Of an optimizer that was made before the LoRA was started."""
    late, usual = Net(16.0), Net(16.0, 3.0)
    optimizer = built("lora_plus", late)
    late.load_state_dict(usual.state_dict())
    measure_start(optimizer, [(*layer.factors, layer.alpha / layer.rank) for layer in late.layers])
    assert distance(trained(late, optimizer), trained(usual, built("lora_plus", usual))) < 1e-12


def test_schedulers_and_what_cannot_work_are_told() -> None:
    net = Net()
    with pytest.raises(ValueError, match="units: got 'other', must be one of plain, start"):
        lora_param_groups(net, units="other")
    with pytest.raises(ValueError, match="no group of the optimizer has unit_scales"):
        in_units(torch.optim.AdamW(lora_param_groups(net)))
    groups = lora_param_groups(net, lr=1e-2, units="start")
    late = torch.optim.AdamW(groups)
    torch.optim.lr_scheduler.ConstantLR(late)
    with pytest.raises(ValueError, match="must come before learning rate schedulers"):
        in_units(late)
    with pytest.raises(ValueError, match="LBFGS evaluates the model within its step"):
        in_units(torch.optim.LBFGS(groups[:1]))
    for make in (torch.optim.AdamW, ScaledAdamW):
        with pytest.raises(ValueError, match="unit_scales are not one number above 0"):
            in_units(make([{**groups[0], "unit_scales": [1.0]}], lr=1.0))
    once = foreign(net)
    assert in_units(once) is once


def test_a_scheduler_after_it_sets_the_rate() -> None:
    nets = Net(), Net(16.0)
    paths = []
    for net in nets:
        optimizer = foreign(net)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        path = []
        for _ in range(4):
            path += trained(net, optimizer, 1)
            scheduler.step()
        paths.append(path)
    assert distance(*paths) < 1e-9


@pytest.mark.parametrize("make", [foreign, lambda net: built("scaled_adamw", net)])
def test_step_hooks_of_others_see_the_usual_parameters(make: Callable[[Net], Any]) -> None:
    net = Net(16.0)
    optimizer, seen = make(net), []
    trained(net, optimizer, 1)
    before, update = [p.detach().clone() for p in net.parameters()], net.updates
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.detach().clone() for p in net.parameters()]))
    optimizer.register_step_post_hook(lambda *_: seen.append(update()))
    trained(net, optimizer, 1)
    assert len(seen) == 2 and all(map(torch.equal, seen[0], before)) and all(map(torch.equal, seen[1], update()))


def test_a_gradient_scaler_goes_along() -> None:
    usual, scaled = Net(16.0, dtype=torch.float32), Net(16.0, dtype=torch.float32)
    for fused in (False, True):
        one, other = foreign(usual, fused=fused), foreign(scaled, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(3):
            backward(usual)
            one.step()
            scaled.zero_grad()
            scaler.scale(scaled.loss()).backward()
            scaler.step(other)
            scaler.update()
        assert distance(usual.updates(), scaled.updates()) < 1e-6


def test_lora_muon_in_units_takes_the_correction_of_units() -> None:
    net = Net(16.0)
    groups = lora_param_groups(net, units="start")
    optimizer = LoRAMuon(groups, lr=1e-2)
    backward(net)
    optimizer.step()
    (_, batches) = optimizer._batches[0]
    assert {s for batch in batches for s in batch.scalings} == {scaling_in_units(1.0, 1 / 3, 1.0)}
    assert len(batches) == len(set(SHAPES))
