"""Plug-ins through torchmetrics: two processes give what one gives, bit for bit, also when one of them has nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from dreamlora import registry
from dreamlora.eval_loss.metric import EvalLoss
from dreamlora.evaluation.measure import load_metric
from dreamlora.evaluation.metric import PluginMetric
from dreamlora.interfaces import MetricInputs, Reading

DIM = 5
ALL = registry.names("metrics")
ROWS = {"generated": 41, "prompts": 41, "base": 41, "references": 12, "training": 9}
SHARES: list[Any] = [[slice(0, None, 2), slice(1, None, 2)], [slice(0, 0), slice(0, None)]]
"""Of two processes: every second row, as the product does it; and all of them in the second one."""


def inputs() -> MetricInputs:
    """Rows for every side, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    sides = {name: torch.randn(count, DIM, generator=generator) + 0.5 for name, count in ROWS.items()}
    numbers = torch.arange(ROWS["generated"])
    return MetricInputs(groups=numbers % 3, with_subject=numbers % 5 > 0, **sides)


def reading(name: str, share: slice) -> Reading:
    """What the metric says after it was fed with a share of the rows."""
    plugin, every = load_metric(name), inputs()
    metric = PluginMetric(plugin, DIM)
    for side in ("groups", "with_subject", "generated", *plugin.NEEDS):
        rows: Tensor = getattr(every, side)
        metric.update(torch.arange(len(rows))[share], **{side: rows[share]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric.compute()


def losses(share: slice) -> list[float]:
    metric, every = EvalLoss(), inputs()
    metric.update(torch.arange(ROWS["base"])[share], every.generated[share], every.base[share])  # type: ignore[index]
    return metric.compute().tolist()


def process(rank: int, folder: Path) -> None:
    """One of two processes: writes what it gets."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = [([reading(name, shares[rank]) for name in ALL], losses(shares[rank])) for shares in SHARES]
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    distributed.destroy_process_group()


def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    """Also p-values, alarms and numbers of images; and the loss of every item at its place."""
    multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    expected = ([reading(name, slice(None)) for name in ALL], losses(slice(None)))
    for rank in (0, 1):
        assert pickle.loads((tmp_path / str(rank)).read_bytes()) == [expected] * len(SHARES)


@pytest.mark.filterwarnings("ignore:fd of")
@pytest.mark.parametrize("name", ALL)
def test_it_is_the_plug_ins_pure_function(name: str) -> None:
    found = reading(name, slice(None))
    assert found == load_metric(name).compute(inputs())
    assert isinstance(found.value, float) and found.n in (41, 32, 9)


def test_it_is_a_metric_like_others() -> None:
    """torchmetrics copies metrics for its collections."""
    metric = PluginMetric(load_metric("clip_score"), DIM)
    every = inputs()
    labels = {"groups": every.groups, "with_subject": every.with_subject}
    metric.update(torch.arange(41), generated=every.generated, prompts=every.prompts, **labels)
    for other in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.compute() == metric.compute()
