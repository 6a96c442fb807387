"""What is not finite: gradients stop the run or are skipped by fp16's scaler, and nothing of it is ever saved."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamlora import registry
from dreamlora.errors import DivergedError
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from dreamlora.training.ema import MovingAverage
from dreamlora.training.loop import Run
from tests.training.conftest import with_optimizer
from tests.training.test_run import weights

pytestmark = pytest.mark.usefixtures("no_report")

every_optimizer = pytest.mark.parametrize("name", registry.names("optimizers"))
clipped_or_not = pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])


@pytest.fixture(scope="module")
def prepared(prepare: Callable[..., Run], sd_folder: Path) -> Run:
    run = prepare(sd_folder)
    run.model.train()
    return run


@pytest.fixture
def run(prepared: Run) -> Iterator[Run]:
    """Ready for the first step; the weights are put back afterwards."""
    start = copies(prepared)
    yield prepared
    prepared.accelerator.scaler = None
    for parameter, value in zip(prepared.trainables.values(), start, strict=True):
        parameter.data.copy_(value)
        parameter.grad = None


def copies(run: Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.trainables.values()]


def step(run: Run) -> Any:
    """One step of the loop."""
    result, _ = loop.optimizer_step(run, loop.next_batches(run, run.step, 0))
    return result


@contextlib.contextmanager
def broken_gradients(run: Run, value: float) -> Iterator[None]:
    """The loss is finite, its gradient is not: an overflow in the backward pass."""
    parameter = list(run.trainables.values())[-1]
    hook = parameter.register_hook(lambda gradient: gradient + value)
    try:
        yield
    finally:
        hook.remove()


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@every_optimizer
@pytest.mark.parametrize(("max_grad_norm", "value"), [(0.0, math.nan), (1.0, math.inf)])
def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_run(
    run: Run, name: str, max_grad_norm: float, value: float
) -> None:
    run = with_optimizer(run, name, max_grad_norm=max_grad_norm)
    step(run)
    before, state = copies(run), copy.deepcopy(run.optimizer.state_dict()["state"])
    with (
        broken_gradients(run, value),
        pytest.raises(DivergedError, match=r"norm of the gradients.*step 2 .*--learning"),
    ):
        step(run)
    assert same(before, copies(run)) and run.lr_scheduler.last_epoch == 1
    torch.testing.assert_close(run.optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_matrices_that_cannot_be_factorised_any_more_end_the_run_as_diverged(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT's Riemannian optimizer meets them, before the loss is infinite."""

    def fail() -> None:
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    run = with_optimizer(run, "sgd")
    monkeypatch.setattr(run.optimizer.optimizer, "step", fail)
    with pytest.raises(DivergedError, match=r"optimizer .*step 1 .*failed to converge.*lower --learning_rate"):
        step(run)


def test_the_norm_of_the_gradients_is_known_without_clipping(run: Run) -> None:
    start, norms = copies(run), []
    for limit in (0.0, 1e-4):
        for parameter, value in zip(run.trainables.values(), start, strict=True):
            parameter.data.copy_(value)
        norms.append(step(with_optimizer(run, "sgd", max_grad_norm=limit)).grad_norm)
    assert norms[0] == norms[1] > 1e-4


@every_optimizer
@clipped_or_not
def test_fp16_gives_up_when_no_gradient_is_ever_finite(
    run: Run, name: str, max_grad_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED_STEPS", 2)
    scaler = torch.amp.GradScaler("cpu")
    run = with_optimizer(run, name, scaler, max_grad_norm=max_grad_norm)
    before = copies(run)
    with broken_gradients(run, math.inf):
        assert [step(run).skipped for _ in range(2)] == [True, True]
        with pytest.raises(DivergedError, match="norm of the gradients is not finite at step 3"):
            step(run)
    assert same(before, copies(run)) and run.lr_scheduler.last_epoch == 0
    assert scaler.get_scale() <= 2.0**14


@every_optimizer
@clipped_or_not
def test_a_step_that_fp16_skips_is_as_if_it_had_not_been(run: Run, name: str, max_grad_norm: float) -> None:
    start = copies(run)
    scaled = with_optimizer(run, name, torch.amp.GradScaler("cpu"), max_grad_norm=max_grad_norm)
    with broken_gradients(scaled, math.inf):
        assert step(scaled).skipped and scaled.skipped_steps == 1
    assert not step(scaled).skipped and not step(scaled).skipped
    assert scaled.step == 3 and scaled.skipped_steps == 0 and scaled.lr_scheduler.last_epoch == 2
    found = copies(run)
    for parameter, value in zip(run.trainables.values(), start, strict=True):
        parameter.data.copy_(value)
    plain = with_optimizer(run, name, max_grad_norm=max_grad_norm)
    plain.step = 1
    step(plain), step(plain)
    assert same(found, copies(run))  # the scale is a power of two: it changes no bit


def test_a_step_that_fp16_skips_is_none_of_the_average(run: Run) -> None:
    start = copies(run)
    run = with_optimizer(run, "sgd", torch.amp.GradScaler("cpu"))
    run.average = MovingAverage(run.trainables, 0.5)

    def look(value: float = 0.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Trained weights and average after a step whose gradients lie so far off."""
        run.to_training()
        with broken_gradients(run, value):
            assert step(run).skipped is bool(value)
        trained = copies(run)
        run.to_looking()
        return trained, copies(run)

    assert same(start, look(math.inf)[1])
    (first, _), (second, average) = look(), look()
    assert same(average, look(math.inf)[1])
    shares = 2 / 11, 1 - 2 / 11
    expected = [shares[0] * before + shares[1] * now for before, now in zip(first, second, strict=True)]
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


QUIET = ["--sample_steps", "0", "--eval_steps", "0", "--max_train_steps", "6"]


def break_after(monkeypatch: pytest.MonkeyPatch, calls: int, what: str) -> None:
    """After so many updates one leaves something infinite, though its gradient was finite."""
    original, count = torch.optim.AdamW.step, [0]

    def update(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        count[0] += 1
        if count[0] == calls:
            parameter = self.param_groups[0]["params"][-1]
            (parameter.data if what == "weights" else self.state[parameter][what]).fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)


@pytest.mark.parametrize("what", ["weights", "exp_avg_sq"])
def test_no_checkpoint_holds_what_is_not_finite(
    train: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    break_after(monkeypatch, 4, what)
    with pytest.raises(
        DivergedError, match=r"not finite after step 4, and is not saved.*The last checkpoint, .*000002, is good"
    ):
        train(*QUIET)
    assert RunFolder(tmp_path / "run").checkpoint_steps() == [2]


def test_no_lora_is_written_that_is_not_finite(
    train: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_after(monkeypatch, 6, "weights")
    with pytest.raises(DivergedError, match=r"LoRA's .*lora_B.* is not finite after step 6.*There is no checkpoint"):
        train(*QUIET, "--checkpointing_steps", "0")
    assert not RunFolder(tmp_path / "run").lora_file.exists()


def test_skipped_steps_are_logged_and_a_resume_goes_on_counting(
    train: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamlora.run import assemble

    original, resumed_at = assemble._prepare, []

    def prepare(*arguments: Any) -> tuple[Run, Any]:
        """In fp16, with broken gradients at steps 2 and 4."""
        arguments[0].accelerator.scaler = torch.amp.GradScaler("cpu")
        run, pictures = original(*arguments)
        resumed_at.append((run.step, run.skipped_steps))
        parameter = list(run.trainables.values())[-1]
        parameter.register_hook(lambda gradient: gradient * (math.inf if run.step in (1, 3) else 1))
        return run, pictures

    monkeypatch.setattr(assemble, "_prepare", prepare)
    whole = train(*QUIET)
    skipped = [(row["step"], row["value"]) for row in whole.metrics() if row["name"] == "train/skipped"]
    assert skipped == [(2, 1.0), (4, 1.0)]
    norms = [row["step"] for row in whole.metrics() if row["name"] == "train/grad_norm"]
    assert norms == [1, 3, 5, 6]
    train(*QUIET, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(whole.checkpoint_dir(4)))
    assert resumed_at == [(0, 0), (4, 1)]
    assert all(torch.isfinite(tensor).all() for tensor in weights(whole).values())
