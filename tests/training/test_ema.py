"""The moving average: its formula, that nobody but the optimizer sees past it, and that the optimizer never sees it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamlora.errors import UserError
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.runfolder import TRAINABLES_FILE, RunFolder
from dreamlora.training import loop
from dreamlora.training.ema import MovingAverage
from tests.training.test_resume import HARD, assert_equal_runs, interrupt_after
from tests.training.test_run import same, weights

pytestmark = pytest.mark.usefixtures("no_report")

Train = Callable[..., RunFolder]
AVERAGED = ["--ema_decay", "0.5"]
"""Below the warm-up from step 10 on."""


def parameters_of(count: int = 3) -> dict[str, nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    return {f"p{n}": nn.Parameter(torch.randn(n + 2, 3, generator=draws)) for n in range(count)}


def walk(average: MovingAverage, parameters: dict[str, nn.Parameter], steps: int) -> Iterator[dict[str, Tensor]]:
    """Random steps; the trained weights after each. In between the average is looked at."""
    draws = torch.Generator().manual_seed(1)
    for number in range(1, steps + 1):
        average.train()
        for parameter in parameters.values():
            parameter.data += torch.randn(parameter.shape, generator=draws)
        average.update(number)
        yield {name: parameter.detach().clone() for name, parameter in parameters.items()}
        average.eval()


def averaged(path: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The sum of all weights of a path, each times what it counts, in float64."""
    decays = [min(decay, (1 + n) / (10 + n)) if n else 0.0 for n in range(len(path))]  # n: steps before
    shares = [(1 - own) * np.prod(decays[n + 1 :]) for n, own in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    return {name: sum(s * one[name].double() for s, one in zip(shares, path, strict=True)) for name in path[0]}  # type: ignore[misc]


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.allclose(first[name].double(), second[name].double(), rtol=1e-5, atol=1e-6) for name in second)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.9999])
def test_it_is_the_weighted_sum_of_the_path_and_what_diffusers_makes(decay: float) -> None:
    parameters = parameters_of()
    average = MovingAverage(parameters, decay)
    theirs = EMAModel(parameters.values(), decay=decay)
    path = []
    for trained in walk(average, parameters, 40):
        path.append(trained)
        theirs.step(parameters.values())
        average.eval()
        assert close(dict(zip(parameters, theirs.shadow_params, strict=True)), parameters)
        assert close(averaged(path, decay), parameters)
        average.train()


def test_the_trained_weights_come_back_to_the_last_bit() -> None:
    parameters, alone = parameters_of(), parameters_of()
    seen = list(walk(MovingAverage(parameters, 0.99), parameters, 12))
    apart = MovingAverage(alone, 0.99)
    apart.eval = lambda: None  # type: ignore[method-assign]
    assert all(same(one, other) for one, other in zip(seen, walk(apart, alone, 12), strict=True))


def test_before_the_first_step_there_is_nothing_but_the_start() -> None:
    parameters = parameters_of()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    average = MovingAverage(parameters, 0.9)
    for switch in (average.eval, average.eval, average.train, average.train, average.eval):  # fp16 skipped a step
        switch()
        assert same(start, {name: parameter.detach() for name, parameter in parameters.items()})
        assert same(start, average.hidden())
    with average.trained():
        assert same(start, {name: parameter.detach() for name, parameter in parameters.items()})


@pytest.fixture
def trained_path(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What trains after every optimizer step of the run to come."""
    path: list[dict[str, Tensor]] = []
    original = loop._update

    def recording(run: Any, *rest: Any) -> None:
        original(run, *rest)
        path.append({name: parameter.detach().clone() for name, parameter in run.trainables.items()})

    monkeypatch.setattr(loop, "_update", recording)
    return path


def losses_of(run: RunFolder, name: str) -> dict[int, float]:
    return {row["step"]: row["value"] for row in run.metrics() if row["name"] == name}


def test_all_look_at_the_average_and_the_training_does_not_know_of_it(
    train: Train, tmp_path: Path, trained_path: list[dict[str, Tensor]]
) -> None:
    hard = [*HARD, "--train_text_encoder", "--init", "pissa", "--gradient_accumulation_steps", "2"]
    plain = train(*hard, "--output_dir", str(tmp_path / "plain"))
    without = list(trained_path)
    trained_path.clear()
    run = train(*hard, *AVERAGED)
    assert len(trained_path) == 6 and all(same(one, two) for one, two in zip(trained_path, without, strict=True))
    assert losses_of(run, "train/loss") == losses_of(plain, "train/loss")

    assert same(load_file(run.raw / run.lora_file.name), weights(plain)) and not plain.raw.exists()
    assert not same(weights(run), weights(plain))
    step = run.selection()["step"]
    kept = load_file(run.candidate_dir(step) / TRAINABLES_FILE)
    assert close(averaged(trained_path[:step], 0.5), kept)
    assert step == 6 and same(weights(run), load_file(run.best / run.lora_file.name))
    assert same(weights(run), load_file(run.checkpoint_dir(6) / run.lora_file.name))

    raw, others = losses_of(run, "eval/loss_raw"), losses_of(plain, "eval/loss")
    assert raw == {step: others[step] for step in (3, 6)}
    assert losses_of(run, "eval/loss")[0] == others[0] and losses_of(run, "eval/loss")[6] not in raw.values()
    by_item = ItemLosses.load(run.raw_items_file)
    assert by_item.steps == [3, 6] and by_item.mean(6) == raw[6]
    assert by_item.evalset_id == ItemLosses.load(run.eval_items_file).evalset_id
    pictures = [(each.samples / "step_000006").glob("*.png") for each in (run, plain)]
    assert [one.read_bytes() for one in sorted(pictures[0])] != [one.read_bytes() for one in sorted(pictures[1])]


def test_the_product_of_the_averages_is_nearly_the_average_of_the_products(
    train: Train, trained_path: list[dict[str, Tensor]]
) -> None:
    """A and B are averaged each by itself. What that misses is their covariance over the window: little beside how far
    the average lies from the last weights.
    """
    train("--max_train_steps", "40", "--sample_steps", "0", "--eval_steps", "0", "--ema_decay", "0.99")
    pairs = [name for name in trained_path[0] if "lora_A" in name]

    def products(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        factors = {name: (weights[name.replace("lora_A", "lora_B")], weights[name]) for name in pairs}
        return {name: B.double().flatten(1) @ A.double().flatten(1) for name, (B, A) in factors.items()}

    exact = averaged([products(one) for one in trained_path], 0.99)

    def missed(weights: dict[str, Tensor]) -> float:
        found = products(weights)
        return sum(float((found[name] - exact[name]).square().sum()) for name in pairs) ** 0.5

    assert 0 < missed(averaged(trained_path, 0.99)) < 0.1 * missed(trained_path[-1])


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_equals_uninterrupted(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = train(*HARD, *AVERAGED, "--output_dir", str(tmp_path / "whole" / "run"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, step)
        train(*HARD, *AVERAGED)
    resumed = train(*HARD, *AVERAGED, "--resume_from_checkpoint", "latest")
    assert_equal_runs(whole, resumed)
    assert same(*(load_file(run.raw / run.lora_file.name) for run in (whole, resumed)))
    assert whole.raw_items_file.read_bytes() == resumed.raw_items_file.read_bytes()


def test_a_checkpoint_without_the_average_is_refused_by_name(train: Train) -> None:
    run = train("--sample_steps", "0", "--eval_steps", "0")
    shutil.rmtree(run.checkpoint_dir(6))
    with pytest.raises(UserError, match=r"ema_decay: 0.0 then, 0.5 now"):
        train(*AVERAGED, "--sample_steps", "0", "--eval_steps", "0", "--resume_from_checkpoint", "latest")
