"""The gradients of several processes, here threads, become their mean."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from dreamlora.training.gradients import average_gradients


class Processes:
    """As many threads as processes, with accelerate's ``reduce``; it fails if their messages do not fit."""

    def __init__(self, count: int) -> None:
        self.num_processes = count
        self.device = torch.device("cpu")
        self.messages: list[Tensor] = []
        self._all_there = threading.Barrier(count, timeout=10)

    def reduce(self, message: Tensor, how: str) -> Tensor:
        assert how == "mean"
        self.messages.append(message)
        self._all_there.wait()
        return torch.stack(self.messages).mean(0)


def averaged(*given: list[list[float] | None]) -> tuple[list[list[Any]], int]:
    """Every process's gradients afterwards, from those before; and how many messages each process sent."""
    processes = Processes(len(given))
    parameters = [[nn.Parameter(torch.zeros(2)) for _ in own] for own in given]
    for own, values in zip(parameters, given, strict=True):
        for parameter, value in zip(own, values, strict=True):
            parameter.grad = None if value is None else torch.tensor(value)
    threads = [threading.Thread(target=average_gradients, args=(own, processes)) for own in parameters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = [[None if p.grad is None else p.grad.tolist() for p in own] for own in parameters]
    return after, len(processes.messages) // len(given)


def test_every_process_has_the_mean_after_one_message() -> None:
    after, messages = averaged([[1.0, 2.0], [0.0, 8.0]], [[3.0, 4.0], [4.0, -2.0]])
    assert after == [[[2.0, 3.0], [2.0, 3.0]]] * 2
    assert messages == 1


def test_a_gradient_that_some_processes_lack_counts_as_zero_and_one_that_all_lack_stays_missing() -> None:
    after, _ = averaged([None, [0.0, 9.0], None], [None, [3.0, -3.0], [1.0, -1.0]], [None, None, [5.0, 1.0]])
    assert after == [[None, [1.0, 2.0], [2.0, 0.0]]] * 3


def test_one_process_keeps_its_gradients_and_sends_nothing() -> None:
    assert averaged([[1.0, 2.0], None]) == ([[[1.0, 2.0], None]], 0)
