"""Curves: deterministic, readable on any background, harmless inside a page."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from dreamlora.report import charts
from dreamlora.report.facts import Curve, RunFacts
from dreamlora.runfolder import RunFolder

CHARTS = [charts.evaluation_chart, charts.training_chart, charts.rate_chart, charts.change_chart, charts.update_chart]


@pytest.mark.parametrize("chart", CHARTS)
def test_the_same_run_gives_the_same_bytes(
    chart: Callable[[RunFacts], str], make_run: Callable[..., RunFolder]
) -> None:
    folder = make_run()
    svg = chart(RunFacts(folder))
    assert svg == chart(RunFacts(folder))
    assert ElementTree.fromstring(svg).get("role") == "img"
    assert "currentColor" in svg and "#010203" not in svg
    assert "<style" not in svg and "<metadata" not in svg
    assert svg.startswith("<svg ") and ' width="' not in svg.partition(">")[0]


@pytest.mark.parametrize("chart", CHARTS)
def test_without_values_there_is_no_chart(chart: Callable[[RunFacts], str], make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    folder.metrics_file.unlink()
    assert chart(RunFacts(folder)) == ""


def test_ids_of_different_charts_do_not_clash(make_run: Callable[..., RunFolder]) -> None:
    facts = RunFacts(make_run())
    ids = [
        {element.get("id") for element in ElementTree.fromstring(chart(facts)).iter() if element.get("id")}
        for chart in (charts.evaluation_chart, charts.training_chart)
    ]
    assert not ids[0] & ids[1]


def test_groups_are_lines_with_names_and_one_group_needs_none(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    assert all(f">{group}</text>" in charts.change_chart(RunFacts(folder)) for group in ("down_blocks", "up_blocks"))
    rows = [
        row
        for row in folder.metrics_file.read_text(encoding="utf-8").splitlines()
        if "_blocks" not in row and "_block" not in row
    ]
    folder.metrics_file.write_text("\n".join(rows), encoding="utf-8")
    assert ">down_blocks<" not in charts.change_chart(RunFacts(folder))
    assert charts.change_chart(RunFacts(folder))


def test_smoothing_is_the_mean_of_the_window_around_each_step() -> None:
    values = tuple(np.random.default_rng(0).normal(size=100))
    smooth = charts.smoothed(Curve(tuple(range(100)), values))
    assert smooth[50] == pytest.approx(np.mean(values[47:54]))
    assert smooth[0] == pytest.approx(np.mean(values[:4]))
    assert len(smooth) == 100
