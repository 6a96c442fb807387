"""Metrics collect, reset and synchronise: two processes give what one gives, also when one of them has nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from dreamlora.eval_loss.metric import EvalLoss
from dreamlora.metrics._stateful import EmbeddingMetric
from dreamlora.metrics.clip_i import ClipI
from dreamlora.metrics.clip_score import ClipScore
from dreamlora.metrics.cmmd import Cmmd
from dreamlora.metrics.copy import Copy
from dreamlora.metrics.dino import Dino
from dreamlora.metrics.diversity import Diversity
from dreamlora.metrics.drift import Drift
from dreamlora.metrics.fid import FrechetDistance
from dreamlora.metrics.kid import Kid

DIM = 5
METRICS: list[type[EmbeddingMetric]] = [ClipI, ClipScore, Cmmd, Copy, Dino, Diversity, Drift, FrechetDistance, Kid]
SHARES = {"uneven": (slice(0, 25), slice(25, 40)), "one has nothing": (slice(0, 40), None)}
Rows = Callable[..., Tensor]


def data(metric: EmbeddingMetric) -> dict[str, Tensor]:
    """Forty rows for every side, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    rows = {name: torch.randn(40, DIM, generator=generator) + 0.5 for name in metric.SIDES}
    return rows | {name: torch.arange(40) % 3 for name in metric.LABELS}


def fed(metric: EmbeddingMetric, share: slice | None) -> float:
    """The metric's value after it was fed with a share of the data in two pieces."""
    if share is not None:
        for half in (slice(share.start, share.start + 3), slice(share.start + 3, share.stop)):
            metric.update(**{name: rows[half] for name, rows in data(metric).items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(metric.compute())


def process(rank: int, folder: Path) -> None:
    """One of two processes: writes its values."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    values = [fed(metric(DIM), shares[rank]) for shares in SHARES.values() for metric in METRICS]
    torch.save(values, folder / str(rank))
    distributed.destroy_process_group()


def test_two_processes_give_the_value_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    expected = [fed(metric(DIM), slice(0, 40)) for metric in METRICS] * len(SHARES)
    for rank in (0, 1):
        assert torch.load(tmp_path / str(rank)) == pytest.approx(expected, rel=1e-9)


def test_the_evaluation_loss_is_the_mean_of_the_items_squared_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 4, 3, 3, generator=generator)
    metric = EvalLoss()
    metric.update(prediction[:2].bfloat16(), target[:2].bfloat16())
    metric.update(prediction[2:], target[2:])
    rounded = torch.cat([x[:2].bfloat16().float() for x in (prediction, target)])
    expected = sum(float((a - b).square().mean()) for a, b in zip(rounded[:2], rounded[2:], strict=True))
    expected += sum(float((a - b).square().mean()) for a, b in zip(prediction[2:], target[2:], strict=True))
    assert float(metric.compute()) == pytest.approx(expected / 5, rel=1e-6)


def test_a_reset_forgets_and_a_second_compute_goes_on(rows: Rows) -> None:
    metric = ClipScore(6)
    metric.update(images=rows(3), texts=rows(3))
    assert float(metric.compute()) == pytest.approx(1)
    metric.update(images=rows(3), texts=-rows(3))
    assert float(metric.compute()) == pytest.approx(0, abs=1e-7)
    metric.reset()
    metric.update(images=rows(2), texts=-rows(2))
    assert float(metric.compute()) == pytest.approx(-1)


def test_a_metric_holds_no_weights_and_knows_its_sides(rows: Rows) -> None:
    metric = Kid(6)
    assert not metric.state_dict() and not list(metric.parameters())
    with pytest.raises(TypeError, match="Kid takes generated, references"):
        metric.update(images=rows(3))
