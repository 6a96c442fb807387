"""Charts of any numbers and names: whole, small, and soon drawn."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamlora.report import charts, svg
from dreamlora.report.facts import RunFacts
from dreamlora.runfolder import RunFolder
from tests.fuzzing import CASES, fuzzed
from tests.test_escapes import TEXTS, Tags


def drawn(text: str) -> svg.Chart:
    def draw(axes: Any) -> None:
        axes.plot([0, 1, 2], [1, 2, 3], label=text)
        axes.set_ylabel(text)
        axes.annotate(text, (1, 2))
        svg.level(axes, 2, text)
        svg.by_step(axes)
        svg.legend(axes)

    return svg.chart("x", text, draw)


USUAL = set(Tags(drawn("word").inline).tags)


@settings(fuzzed, max_examples=CASES // 10)
@given(TEXTS)
def test_fuzz_names_in_charts(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chart = drawn(text)
    root = ElementTree.fromstring(chart.file.encode("utf-8"))
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= {
        *("svg", "rect", "defs", "g", "path", "clipPath", "use", "text", "tspan", "metadata")
    }
    assert {tag for tag, _ in Tags(chart.inline).tags} <= {tag for tag, _ in USUAL} | {"tspan"}
    attributes = {name for _, names in Tags(chart.inline).tags for name in names}
    assert not any(name.startswith("on") for name in attributes)


@pytest.mark.parametrize(
    "text", ["$\\frac{", "$x^$", "_hidden", "\\", "a\nb", "\x00", "\ud800", "犬", "</text><script>"]
)
def test_a_name_is_drawn_as_it_is(text: str) -> None:
    assert "<script" not in drawn(text).inline
    shown = "".join(ElementTree.fromstring(drawn(text).file.encode("utf-8")).itertext())
    assert text in shown or ascii(text)[1:-1] in shown


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("adamw", ["adamw"]),
        ("", [""]),
        (
            "scaled_adamw:variant=split,scale_correction=true,betas=0.9,0.999+lora_units=start",
            ["scaled_adamw:variant=split,scale_correction=true,", "betas=0.9,0.999+lora_units=start"],
        ),
        ("sgd (without 1 of 5 seeds that failed) and so on, at some length", None),
        ("x" * 120, ["x" * 52, "x" * 52, "x" * 16]),
        ("+".join(f"a{n}=1e+{n}" for n in range(12)), None),
    ],
)
def test_long_names_are_broken_between_their_parts(name: str, lines: list[str] | None) -> None:
    found = svg.lines_of(name)
    assert lines in (None, found) and "".join(found) == name
    assert all(len(line.rstrip()) <= 52 for line in found)


def test_a_long_name_is_cut() -> None:
    began = time.process_time()
    chart = drawn("x" * 100_000)
    assert time.process_time() - began < 2 and len(chart.drawn) < 20_000 and "x…" in chart.drawn


HUGE = st.one_of(st.floats(), st.sampled_from([1e308, -1e308, 5e-324, 0.0, 3e38, -3e38, 1e200, 1e-200, 1.0]))


@settings(fuzzed, max_examples=CASES // 20)
@given(st.lists(HUGE, min_size=1, max_size=4), st.lists(st.integers(0, 2**53), min_size=4, max_size=4, unique=True))
def test_fuzz_numbers_of_a_run(number_run: RunFolder, values: list[float], steps: list[int]) -> None:
    number_run.metrics_file.unlink(missing_ok=True)
    for step, value in zip(sorted(steps), values, strict=False):
        names = ("eval/loss", "train/loss", "train/learning_rate", "train/grad_norm", "lora/dw_norm/a", "lora/dw_norm")
        number_run.log_all(step, dict.fromkeys((*names, "opt/update_rms"), value))
    facts = RunFacts(number_run)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for make in (charts.evaluation_chart, charts.training_chart, charts.rate_chart, charts.change_chart):
            began = time.process_time()
            found = make(facts)
            assert time.process_time() - began < 2 and len(found) < 200_000
            assert not found or ElementTree.fromstring(found.replace("xlink:", "")) is not None


@pytest.fixture(scope="module")
def number_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("numbers"))
    folder.config_file.write_text("max_train_steps: 3\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("style", [{}, {"marker": "o"}])
def test_a_million_points_make_a_small_picture(style: dict[str, Any]) -> None:
    values = np.sin(np.arange(1e6)) + 2
    began = time.process_time()
    chart = svg.chart("x", "x", lambda axes: axes.plot(np.arange(1e6), values, **style))
    assert time.process_time() - began < 2 and len(chart.drawn) < 1_000_000


def test_any_number_of_groups_and_metrics_is_bounded(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(steps=1)
    for step in (0, 1):
        folder.log_all(step, {f"lora/dw_norm/g{number}": 1.0 for number in range(2000)})
        folder.log_all(step, {f"img/m{number}": 1.0 for number in range(200)}, n=4, encoder_id="e")
    facts = RunFacts(folder)
    began = time.process_time()
    assert "of 2003 groups" in charts.change_chart(facts)
    assert time.process_time() - began < 2 and len(charts.image_charts(facts)) == charts._MOST


def test_numbers_at_the_axes_keep_their_powers_and_legends_their_form() -> None:
    def draw(axes: Any) -> None:
        axes.plot([1, 2], [1e-5, 1e-3], marker="s", label="$a^2$")
        axes.set_yscale("log")
        svg.legend(axes)

    found = svg.chart("x", "x", draw).inline
    assert not any("mathdefault" in text for text in ElementTree.fromstring(found.replace("xlink:", "")).itertext())
    assert ">$a^2$<" in found and ">−5<" not in found and "10^" not in re.sub("<!--.*?-->", "", found)
