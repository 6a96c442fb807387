"""Optimizer, moving average and time budget shared by the stages."""

import copy
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the Muon reference implementation
REPORT_EVERY, SAVE_SECONDS = 100, 150
FIRST_AND_LAST = ("conv_in", "conv_out", "embedding", "position")  # Muon is meant for hidden matrices only


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate U V^T of `matrix` = U S V^T, (rows, columns), by Newton-Schulz in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix (a convolution counts as (out, in * kh * kw)); Jordan et al. 2024.

    The step is scaled by 0.2 sqrt(max(rows, columns)), so that its root mean square is that of an AdamW step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not supported."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter.grad))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"]).flatten(1)  # Nesterov
                scale = 0.2 * max(update.shape) ** 0.5
                parameter.add_(orthogonalise(update).view_as(parameter), alpha=-group["lr"] * scale)


class MuonAndAdamW:
    """Muon on the hidden matrices and convolutions of a module, AdamW on everything else."""

    def __init__(self, module: nn.Module, recipe: "PretrainingRecipe") -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim > 1 and not any(part in name for part in recipe.not_for_muon)
            (matrices if hidden else others).append(parameter)
        self.parameters = matrices + others
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, recipe.muon_lr),
            torch.optim.AdamW(others, recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_lrs = (recipe.muon_lr, recipe.adamw_lr)

    def step(self, factor: float, clip: float = 1.0) -> None:
        """Clip the gradient norm, update with learning rates times `factor`, clear the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, clip)
        for part, lr in zip(self.parts, self.base_lrs, strict=True):
            part.param_groups[0]["lr"] = lr * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """The states of both parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Average:
    """Exponential moving average of a module's parameters, with a warm-up so that it forgets the random start."""

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's present parameters."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


class Budget:
    """A wall-clock budget: the learning rate warms up, stays flat until `hold` of the time, then falls to 0."""

    def __init__(self, minutes: float, hold: float, spent: float = 0.0) -> None:
        self.seconds, self.hold = minutes * 60, hold
        self._start = time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds used, those before a resume included."""
        return time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1."""
        return min(1.0, self.spent / self.seconds)

    def factor(self, step: int, warmup: int = 100) -> float:
        """What to multiply the learning rates by."""
        decay = min(1.0, (1 - self.progress) / (1 - self.hold))
        return min(decay, (step + 1) / warmup)


@dataclass(frozen=True)
class PretrainingRecipe:
    """What differs between the stages' training runs."""

    name: str  # of the checkpoint file and the log lines
    minutes: float
    muon_lr: float
    adamw_lr: float
    decay: float = 0.998  # of the moving average
    hold: float = 0.4  # share of the time before the learning rate falls
    not_for_muon: tuple[str, ...] = FIRST_AND_LAST  # parts of parameters' names


def read_average(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    """The averaged weights of a stage's checkpoint."""
    average: dict[str, torch.Tensor]
    average = torch.load(folder / f"{stage}.pt", map_location="cpu", weights_only=True)["average"]
    return average


def load_average(module: nn.Module, folder: Path, stage: str) -> nn.Module:
    """`module` with those weights, ready for inference."""
    module.load_state_dict(read_average(folder, stage))
    return module.eval().requires_grad_(False)


class PretrainingRun:
    """One training run: optimizer, average, budget, log lines, and a checkpoint to resume from.

    Attributes:
        model: the weights, float32.
        working: what the losses are computed with: the model, or the copy of it that the argument of that name makes,
            for example in bfloat16; each update moves gradients from it and weights to it.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: PretrainingRecipe,
        folder: Path,
        device: torch.device,
        working: Callable[[Any], nn.Module] | None = None,
    ) -> None:
        self.model, self.recipe, self.path = model.to(device), recipe, folder / f"{recipe.name}.pt"
        self.average = Average(model, recipe.decay)
        self.optimizer = MuonAndAdamW(model, recipe)
        self.step, self._saved, self._total = 0, 0.0, 0.0
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            self.average.module.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = self.average.steps = state["step"]
            self._saved = state["spent"]
        self.working = working(model) if working else model
        self.budget = Budget(recipe.minutes, recipe.hold, self._saved)
        torch.manual_seed(self.step)

    @property
    def unfinished(self) -> bool:
        """Whether time is left."""
        return self.budget.progress < 1

    def update(self, loss: torch.Tensor, report: Callable[[], str] = str) -> None:
        """One step on the loss; now and then a log line, with what `report` adds, and a checkpoint."""
        loss.backward()
        self._collect_gradients()
        self.optimizer.step(self.budget.factor(self.step))
        self._hand_out_weights()
        self.average.update(self.model)
        self.step, self._total = self.step + 1, self._total + loss.item()
        if self.step % REPORT_EVERY == 0:
            mean, self._total = self._total / REPORT_EVERY, 0.0
            line = (self.recipe.name, self.step, self.budget.spent, mean, report())
            logger.info("%s step %d, %.0f s, loss %.4f %s", *line)
        if self.budget.spent - self._saved > SAVE_SECONDS or not self.unfinished:
            self.save()

    def _collect_gradients(self) -> None:
        if self.working is not self.model:
            for parameter, copied in zip(self.model.parameters(), self.working.parameters(), strict=True):
                parameter.grad = None if copied.grad is None else copied.grad.to(parameter.dtype)
                copied.grad = None

    @torch.no_grad()
    def _hand_out_weights(self) -> None:
        if self.working is not self.model:
            torch._foreach_copy_(list(self.working.parameters()), list(self.model.parameters()))

    def save(self) -> None:
        """Write the checkpoint: under a temporary name first, so that a killed run leaves the previous one whole."""
        self._saved = self.budget.spent
        state: dict[str, object] = {"model": self.model.state_dict(), "average": self.average.module.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "spent": self._saved}
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)
