"""What holds for every init: the model is unchanged at first, the base is never touched, draws go by seed and name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.lora.pairs import restore_starts, starts_of
from dreamlora.optimizers import check_compatibility
from tests.inits.problems import Net, problem

INITS = registry.names("inits")
ON_LINEAR_ONLY = ("eva",)
WHOLE = {"lora_ga": {"draws": 12}, "eva": {"draws": 12, "tau": 0.5}}


def started(name: str, **settings):
    made = problem(**settings)
    if name in ON_LINEAR_ONLY:
        made.targets = [target for target in made.targets if target.name != "conv"]
    made.start(name, **WHOLE.get(name, {}))
    return made


def test_the_names_are_those_of_the_documents():
    assert INITS == ["eva", "gaussian", "kaiming", "lora_ga", "nora", "olora", "orthogonal", "pissa"]


@pytest.mark.parametrize("name", INITS)
def test_the_model_is_unchanged_at_first(name):
    made = started(name)
    x = made.batches[0]
    if name == "orthogonal":  # B A is zero up to rounding only
        torch.testing.assert_close(made.net(x), made.base(x), rtol=0, atol=1e-6)
    else:
        assert torch.equal(made.net(x), made.base(x))
    size = max(weight.abs().max() for weight in made.change())
    assert size == 0 or (name == "orthogonal" and size < 1e-7)
    assert all(target.A.abs().max() > 0 for target in made.targets)


@pytest.mark.parametrize("name", INITS)
def test_the_base_is_not_touched_and_the_factors_train(name):
    made = started(name)
    for target in made.targets:
        assert torch.equal(target.layer.base_layer.weight, made.base.get_submodule(target.name).weight)
        assert target.A.requires_grad and target.B.requires_grad
        assert target.A.grad is None and target.B.grad is None
    made.probe.loss(0).backward()
    assert all(target.B.grad.abs().max() > 0 for target in made.targets)
    names = {name for name, parameter in made.net.named_parameters() if parameter.requires_grad}
    assert len(names) == 6 and all("lora_" in name for name in names)


@pytest.mark.parametrize("name", [name for name in INITS if name not in ON_LINEAR_ONLY])
def test_the_start_of_a_bf16_base_is_fp32_and_exact(name):
    made = started(name, dtype=torch.bfloat16)
    x = made.batches[0]
    tolerance = 2e-2 if name == "orthogonal" else 0
    torch.testing.assert_close(made.net(x), made.base(x), rtol=0, atol=tolerance)
    assert {target.A.dtype for target in made.targets} == {torch.float32}


@pytest.mark.parametrize("name", INITS)
def test_neither_earlier_draws_nor_other_layers_matter(name):
    torch.manual_seed(5)
    first = started(name)
    torch.manual_seed(6)
    again = started(name)
    for one, other in zip(first.targets, again.targets, strict=True):
        assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


@pytest.mark.parametrize("name", ["gaussian", "kaiming", "nora", "orthogonal"])
def test_the_seed_and_the_name_decide_the_draws(name):
    made, other = problem(), problem()
    other.targets = [replace(target, key=(1, target.name)) for target in other.targets]
    for one, two in zip(made.start(name), other.start(name), strict=True):
        assert not torch.equal(one.A, two.A)


@pytest.mark.parametrize(("name", "rank"), [("pissa", 7), ("olora", 7), ("nora", 7), ("lora_ga", 4), ("eva", 7)])
def test_a_rank_that_a_layer_does_not_have_is_refused(name, rank):
    with pytest.raises(
        UserError, match=rf"--init {name} with --rank {rank} needs layers of at least .*out has 8 and 6"
    ):
        started(name, rank=rank)


@pytest.mark.parametrize("name", ["pissa", "olora", "nora", "lora_ga", "orthogonal"])
def test_grouped_convolutions_are_refused_where_b_times_a_is_not_their_weight(name):
    made = problem()
    grouped = replace(made.targets[0], layer=nn.ModuleDict({"base_layer": nn.Conv2d(4, 8, 3, groups=2)}))
    grouped.layer.base_layer = grouped.layer["base_layer"]
    made.targets = [grouped]
    with pytest.raises(UserError, match=rf"--init {name} needs layers .*conv is quantised or a grouped convolution"):
        made.start(name)


def test_eva_refuses_convolutions_by_name():
    with pytest.raises(UserError, match=r"PEFT's EVA takes Linear layers only, but conv is a Conv2d"):
        problem().start("eva")


def test_components_that_never_settle_are_an_error_and_no_endless_loop(monkeypatch):
    from dreamlora.inits import eva

    monkeypatch.setattr(eva, "MOST_PASSES", 3)
    made = problem()
    made.targets = [target for target in made.targets if target.name != "conv"]
    with pytest.raises(UserError, match=r"the inputs of square, out have no 2 directions that settle"):
        made.start("eva", draws=12, tau=1 - 1e-9)


def test_layers_that_see_fewer_rows_than_the_rank_are_an_error():
    made = problem(rank=5)
    made.targets = [target for target in made.targets if target.name == "out"]
    made.probe = replace(made.probe, loss=lambda number: made.net(made.batches[number][:1, :, :3, :3]).sum())
    with pytest.raises(UserError, match=r"the inputs of out have no 5 directions that settle.*fewer rows"):
        made.start("eva", draws=12)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("nora", {"sigma": 0.0}),
        ("pissa", {"niter": -1}),
        ("lora_ga", {"gamma": 0.0}),
        ("lora_ga", {"draws": 0}),
        ("lora_ga", {"iterations": -1}),
        ("lora_ga", {"oversampling": 0.5}),
        ("lora_ga", {"norm_clip": "no"}),
        ("eva", {"tau": 1.0}),
        ("eva", {"draws": 0}),
    ],
)
def test_settings_out_of_range(name, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        registry.load("inits", name).Options(**setting)


def test_dropout_hits_both_halves_alike():
    """Else B₀ A₀ would be noise of its full size in every training step."""
    made = problem(dropout=0.5)
    made.start("pissa")
    made.net.train()
    assert torch.equal(made.net(made.batches[0]), made.base(made.batches[0]))


def test_gradients_belong_together_as_in_any_lora():
    """What optimizers for pairs rely on: gA Aᵀ = Bᵀ gB, also where the distance from a start is what counts."""
    made = problem()
    made.start("pissa")
    for target in made.targets:
        target.B.data += 0.1 * torch.randn_like(target.B)
        target.A.data += 0.1 * torch.randn_like(target.A)
    made.probe.loss(0).backward()
    errors = check_compatibility(made.net)
    assert len(errors) == 3 and max(errors.values()) < 1e-5


def test_the_saved_start_is_attached_again():
    first, second = problem(), problem()
    first.start("pissa")
    with torch.no_grad():
        for one, other in zip(first.targets, second.targets, strict=True):
            one.B.add_(torch.randn_like(one.B))
            other.B.copy_(one.B)
            other.A.copy_(one.A)
    restore_starts(second.net, starts_of(first.net))
    assert torch.equal(first.net(first.batches[0]), second.net(first.batches[0]))
    assert not starts_of(Net())
