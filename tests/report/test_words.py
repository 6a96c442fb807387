"""Sentences of the report follow the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dreamlora.report import words
from dreamlora.report.facts import Facts
from dreamlora.runfolder import RunFolder


def headline_of(folder: RunFolder, values: list[float], name: str = "eval/loss") -> str:
    folder.metrics_file.unlink()
    for step, value in enumerate(values):
        folder.log(100 * step, name, value)
    return words.headline(Facts(folder))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.5, 0.4], "The loss on 5 held-out images fell from 0.5000 (base model) to 0.4000 (−20.0%)."),
        ([0.5, 0.6], "rose from 0.5000 (base model) to 0.6000 (+20.0%). It was best before the first step"),
        ([0.5, 0.4, 0.45], "It was best at step 100, with 0.4000: later steps made it worse."),
        ([0.5, 0.501], "hardly changed: from 0.5000 (base model) to 0.5010."),
        ([0.5], "The loss on 5 held-out images is 0.5000 at step 0."),
        ([], "0 steps were trained; no evaluation was logged."),
    ],
)
def test_headline(values: list[float], told: str, make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    folder.metrics_file.touch()
    assert told in headline_of(folder, values)


def test_an_unfinished_run_is_told_as_such(make_run: Callable[..., RunFolder]) -> None:
    assert headline_of(make_run(summary=None), [0.5, 0.4]).endswith("(−20.0%) so far.")


@pytest.mark.parametrize(
    ("parity", "verdict", "told"),
    [
        ({"max_abs": 0, "mean_abs": 0, "psnr_db": 999}, "good", "draws exactly the image"),
        ({"max_abs": 2, "mean_abs": 0.1, "psnr_db": 50}, "good", "but for rounding (largest difference 2 of 255"),
        ({"max_abs": 9, "mean_abs": 1, "psnr_db": 33}, "fair", "draws nearly the image"),
        ({"max_abs": 99, "mean_abs": 9, "psnr_db": 20}, "bad", "does not draw the image"),
        ({"reason": "there are no samples"}, "unknown", "Not checked: there are no samples."),
        (None, "unknown", "Not checked"),
    ],
)
def test_parity(parity: dict | None, verdict: str, told: str, make_run: Callable[..., RunFolder]) -> None:
    found = words.parity(Facts(make_run(summary={"parity": parity})))
    assert found[0] == verdict and told in found[1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (7300, "2 h 1 min"), (30, "30 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text
