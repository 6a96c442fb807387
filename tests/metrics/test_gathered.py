"""Rows collect, reset and come back by their places; what torchmetrics does with processes: tests/evaluation."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from dreamlora import metrics
from dreamlora.cli.parse import parse_run
from dreamlora.errors import UserError
from dreamlora.metrics._gathered import GatheredRows
from dreamlora.run import opening


class Sums(GatheredRows):
    """Something that all could compute."""

    def compute(self) -> Tensor:
        return self.rows("training").sum(0)


def made() -> Sums:
    return Sums({"training": torch.zeros(0, 2), "labels": torch.zeros(0, dtype=torch.int64)})


def test_rows_stand_at_their_places_whatever_the_order_of_the_updates() -> None:
    metric = made()
    metric.update(torch.tensor([3, 0]), training=torch.tensor([[3.0, 3], [0, 0]]), labels=torch.tensor([30, 0]))
    metric.update(torch.tensor([1]), training=torch.tensor([[1.0, 1]]))
    assert metric.rows("training")[:, 0].tolist() == [0, 1, 3] and metric.rows("labels").tolist() == [0, 30]


def test_a_row_that_is_there_twice_is_refused() -> None:
    """Processes that do not know of each other would each hold them all, and every mean would look right."""
    metric = made()
    metric.update(torch.tensor([0, 1, 0]), training=torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="Sums was given rows of training twice for one place"):
        metric.compute()


def test_a_reset_forgets_and_a_second_compute_goes_on() -> None:
    metric = made().eval()  # "training" is an attribute of every torch module, which eval() overwrites
    metric.update(torch.arange(2), training=torch.ones(2, 2))
    assert metric.compute().tolist() == [2, 2]
    metric.update(torch.arange(2, 3), training=torch.ones(1, 2))
    assert metric.compute().tolist() == [3, 3]
    metric.reset()
    assert metric.rows("training").shape == (0, 2)
    metric.update(torch.arange(1), training=torch.ones(1, 2))
    assert metric.compute().tolist() == [1, 1]


def test_it_holds_no_weights_and_knows_its_sides() -> None:
    metric = made()
    assert not metric.state_dict() and not list(metric.parameters())
    with pytest.raises(TypeError, match="Sums has no rows called images"):
        metric.update(torch.arange(1), images=torch.ones(1, 2))
    with pytest.raises(ValueError, match="1 rows of training for 2 places"):
        metric.update(torch.arange(2), training=torch.ones(1, 2))


def test_a_torchmetrics_that_cannot_be_imported_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch-fidelity but without torchvision: what needs it says so, and a training without it goes on."""
    monkeypatch.delitem(sys.modules, "dreamlora.metrics._gathered")
    monkeypatch.delattr(metrics, "_gathered")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    opening.begin(parse_run(["--eval_steps", "0", "--eval_metrics"])[0])
    assert "dreamlora.metrics._gathered" not in sys.modules
    for flags in ([], ["--eval_steps", "0", "--eval_metrics", "kid"]):
        with pytest.raises(UserError, match=r"torchmetrics cannot be imported \(.*torchmetrics.*install that, or unin"):
            opening.begin(parse_run(flags)[0])
