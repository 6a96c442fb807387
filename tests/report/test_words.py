"""Sentences of the report follow the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dreamlora.eval_loss.items import ItemLosses
from dreamlora.metrics import clip_score, kid
from dreamlora.report import charts, words
from dreamlora.report.facts import RunFacts
from dreamlora.report.page import run_document
from dreamlora.runfolder import RunFolder


def headline_of(folder: RunFolder, values: list[float], name: str = "eval/loss") -> str:
    folder.metrics_file.unlink()
    for step, value in enumerate(values):
        folder.log_all(100 * step, {name: value})
    return words.headline(RunFacts(folder))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.5, 0.4], "The loss on 5 held-out images fell from 0.5000 (base model) to 0.4000 (−20.0 %)."),
        ([0.5, 0.6], "rose from 0.5000 (base model) to 0.6000 (+20.0 %). It was best before the first step"),
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
    assert headline_of(make_run(summary=None), [0.5, 0.4]).endswith("(−20.0 %) so far.")


TOKENS = {"tokens/norm": 1.2, "tokens/change": 0.5}


def test_health_says_only_what_was_logged(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    assert "Balance of A and B: 0.20 (1: equal" in (words.health(RunFacts(folder)) or "")
    rows = [{"v": 1, "step": 0, "name": name, "value": value} for name, value in TOKENS.items()]
    with folder.metrics_file.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    told = (
        "The embeddings of new tokens are 1.2 times as long as the model's own, and have moved by 0.5 of that length."
    )
    assert (words.health(RunFacts(folder)) or "").endswith(told)
    folder.metrics_file.write_text('{"v": 1, "step": 0, "name": "lora/dw_norm", "value": 0.0}\n', encoding="utf-8")
    assert words.health(RunFacts(folder)) == "The LoRA has moved the weights by ‖ΔW‖ = 0."
    folder.metrics_file.write_text("", encoding="utf-8")
    assert words.health(RunFacts(folder)) is None


IMAGE = {"max_abs": 9, "mean_abs": 9, "psnr_db": 999}
CALL = {"effect": 0.1, "error": 0.05, "rounding": 0.1, "scale": 1.0}
PRECISE = {**CALL, "error": 1e-5, "rounding": 1e-5}


@pytest.mark.parametrize(
    ("parity", "verdict", "told"),
    [
        ({"max_abs": 0, "mean_abs": 0, "psnr_db": 999}, "good", "draws exactly the image"),
        ({"max_abs": 2, "mean_abs": 0.1, "psnr_db": 50}, "good", "but for rounding (largest difference 2 of 255"),
        ({"max_abs": 9, "mean_abs": 1, "psnr_db": 33}, "fair", "draws nearly the image"),
        ({"max_abs": 99, "mean_abs": 9, "psnr_db": 20}, "bad", "does not draw the image"),
        ({**IMAGE, "psnr_db": 33, "call": PRECISE}, "fair", "nearly the image"),
        (
            {**IMAGE, "psnr_db": 33, "call": CALL},
            "good",
            "it has 1.00 times the effect, and differs by 0.05",
        ),
        ({**IMAGE, "psnr_db": 20, "call": CALL}, "fair", "rounding adds up over the steps. One call of the denoiser"),
        ({**IMAGE, "psnr_db": 20, "call": PRECISE}, "bad", "does not draw the image"),
        ({**IMAGE, "max_abs": 0, "call": {**CALL, "error": 0.5, "scale": 0.5}}, "bad", "it has 0.50 times the effect"),
        ({**IMAGE, "psnr_db": 50, "call": {**CALL, "error": 0.13}}, "bad", "differs by 0.13 of the effect (rounding"),
        ({**IMAGE, "psnr_db": 50, "call": {**CALL, "error": 0.11}}, "good", "One call of the denoiser does the same"),
        ({**IMAGE, "psnr_db": 50, "call": {**CALL, "error": 0.9, "rounding": 0.6}}, "good", "9, PSNR 50 dB)."),
        ({**IMAGE, "psnr_db": 20, "call": {**CALL, "error": 0.9, "rounding": 0.6}}, "fair", "9, PSNR 20 dB): rounding"),
        ({**IMAGE, "max_abs": 0, "call": {"effect": 0}}, "good", "draws exactly the image seen in training."),
        ({"reason": "there are no samples"}, "unknown", "Not checked: there are no samples."),
        (None, "unknown", "Not checked"),
    ],
)
def test_parity(parity: dict | None, verdict: str, told: str, make_run: Callable[..., RunFolder]) -> None:
    found = words.parity(RunFacts(make_run(summary={"parity": parity})))
    assert found[0] == verdict and told in found[1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (7300, "2 h 1 min"), (30, "30 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def with_best(folder: RunFolder, step: int) -> RunFolder:
    """The run with a selected step and the larger set measured on base, best and last."""
    folder.best.mkdir()
    folder.selection_file.write_text(
        json.dumps({"step": step, "reason": f"Best: step {step}, because."}), encoding="utf-8"
    )
    losses = ItemLosses("id", np.arange(4), np.linspace(0.1, 0.9, 4))
    for at, loss in {0: 0.5, step: 0.375, 300: 0.4}.items():
        losses.put(at, [loss - at / 1e4, loss + at / 1e4, loss, loss])
        folder.log_all(at, {"eval/final_loss": loss, "eval/gap": 0.01 + at / 1e4}, n=4)
    losses.save(folder.final_items_file)
    return folder


def test_the_best_checkpoint_is_compared_with_the_last_on_the_larger_set(make_run: Callable[..., RunFolder]) -> None:
    facts = RunFacts(with_best(make_run(), 225))
    size = "0.025 (8.2 paired standard errors)"
    assert (
        words.best(facts)
        == f"Best: step 225, because. On the 4 items of the larger set it is {size} below the last step."
    )
    assert words.final_table(facts) == [
        ("base model", "0.5000", "–", "0.0100"),
        ("best step, 225", "0.3750", "−25.0 %", "0.0325"),
        ("last step, 300", "0.4000", "−20.0 %", "0.0400"),
    ]
    assert ("best step", "225") in words.numbers(facts)


def test_where_the_last_step_is_the_best(make_run: Callable[..., RunFolder]) -> None:
    facts = RunFacts(with_best(make_run(), 300))
    assert words.best(facts) == "Best: step 300, because."
    assert [row[0] for row in words.final_table(facts)] == ["base model", "best and last step, 300"]


def test_without_a_selection_there_is_nothing_to_say(make_run: Callable[..., RunFolder]) -> None:
    facts = RunFacts(make_run())
    assert words.best(facts) is None and words.final_table(facts) == [] and words.image_table(facts) == []


def test_image_metrics_are_told_with_encoder_and_number(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    for step, value in ((0, 0.25), (150, 0.3), (300, -0.125)):
        more: dict[str, Any] = {"n": 7, "encoder_id": "tiny@1"}
        folder.log_all(step, {"img/clip_t": value}, **more)
        folder.log_all(step, {"img/kid": value / 10}, n_other=8, **more)
        folder.log_all(step, {"img/clip_t_change": value}, n=7, se=0.1)
        folder.log_all(step, {"img/kid_p": value}, n_other=8, **more)
    assert words.image_table(RunFacts(folder)) == [
        ("clip_t", "0.2500", "−0.1250", "7", "tiny@1"),
        ("kid", "0.0250", "−0.0125", "7 and 8", "tiny@1"),
        ("kid_p", "0.2500", "−0.1250", "7 and 8", "tiny@1"),
    ]
    assert captions(folder) == [clip_score.ABOUT, kid.ABOUT], "what else they say has no curve"


def captions(folder: RunFolder) -> list[str]:
    return [caption for caption, _ in charts.image_charts(RunFacts(folder))]


def with_glow(folder: RunFolder) -> RunFolder:
    """A run whose images were measured by a plug-in of somebody else."""
    for step, value in ((0, 0.25), (300, 0.5)):
        folder.log_all(step, {"img/glow": value, "img/glow_spread": 1.0}, n=7, n_other=2, encoder_id="tiny@1")
    return folder


@pytest.mark.usefixtures("glow")
def test_a_metric_that_was_put_into_the_folder_has_its_curve_and_its_words(make_run: Callable[..., RunFolder]) -> None:
    folder = with_glow(make_run())
    assert captions(folder) == ["Glow: how much brighter than the held-out images. Near 0 is better"]
    html = run_document(folder).render()["report.html"]
    assert 'aria-label="glow by step: 0.25 at step 0, 0.5 at the end"' in html and "Glow: how much brighter" in html


def test_a_metric_that_is_not_installed_here_has_its_curve_under_its_bare_name(
    make_run: Callable[..., RunFolder],
) -> None:
    assert captions(with_glow(make_run())) == ["glow"]


def averaged(folder: RunFolder, by: float, spread: float = 0.0) -> RunFolder:
    """The run with raw losses that lie so far above the average's, and so far apart from item to item."""
    losses = ItemLosses.load(folder.eval_items_file)
    raw = losses.rows[300] + by + spread * np.array([1, -1] * 20, dtype=np.float32)
    ItemLosses(losses.evalset_id, losses.image, losses.position, {150: raw, 300: raw}).save(folder.raw_items_file)
    for step in (150, 300):
        folder.log_all(step, {"eval/loss_raw": float(raw.mean())})
    return folder


@pytest.mark.parametrize(
    ("by", "spread", "told"),
    [
        (0.01, 0.004, "the weights without it have 0.3600, 0.01 (15.6 paired standard errors) higher."),
        (-0.01, 0.004, "the weights without it have 0.3400, 0.01 (15.6 paired standard errors) lower."),
        (0.001, 0.04, "the weights without it have 0.3510, which cannot be told apart."),
    ],
)
def test_the_average_beside_the_weights_that_it_is_of(
    by: float, spread: float, told: str, make_run: Callable[..., RunFolder]
) -> None:
    folder = averaged(make_run(), by, spread)
    sentence = f"The moving average has a loss of 0.3500 at step 300, {told}"
    assert words.average(RunFacts(folder)) == sentence
    folder.raw.mkdir()
    document = run_document(folder).render()
    assert all(f"{sentence} Their LoRA lies in raw/." in text for text in document.values())
    assert '<a href="raw">' in document["report.html"]
    chart = charts.evaluation_chart(RunFacts(folder))
    assert ">moving average<" in chart and ">without it<" in chart


def test_nothing_is_told_of_an_average_that_is_none(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    assert words.average(RunFacts(folder)) is None
    assert "moving average" not in "".join(run_document(folder).render().values())
    averaged(folder, 0.01)
    other = ItemLosses.load(folder.raw_items_file)
    other.evalset_id = "of other items"
    other.save(folder.raw_items_file)
    assert words.average(RunFacts(folder)) is None
    folder.raw_items_file.write_bytes(b"damaged")
    assert words.average(RunFacts(folder)) is None


@pytest.mark.parametrize(
    ("adapter", "told"), [("lora", "LoRA"), ("dora", "DoRA"), ("a stranger's", "LoRA"), (None, "LoRA")]
)
def test_the_kind_of_adapter_is_told(adapter: str | None, told: str, make_run: Callable[..., RunFolder]) -> None:
    facts = RunFacts(make_run())
    facts.config.pop("adapter", None)
    if adapter:
        facts.config["adapter"] = adapter
    assert words.setup(facts).startswith(f"{told} of rank ")


@pytest.mark.parametrize(("optimizer", "told"), [("adamw", True), ("lora_muon", False), ("a stranger's", True)])
def test_units_of_the_start_are_told_where_the_rate_is_in_them(
    optimizer: str, told: bool, make_run: Callable[..., RunFolder]
) -> None:
    facts = RunFacts(make_run())
    facts.config |= {"optimizer": optimizer, "lora_units": "start"}
    assert ("in units of the start" in words.setup(facts)) == told


def test_a_rate_that_was_found_is_told_as_such(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    facts = RunFacts(folder)
    facts.config |= {"optimizer": "prodigy", "learning_rate": 1.0}
    assert "learning rate 1 × what it finds ·" in words.setup(facts)
    folder.range_test_file.write_text('{"learning_rate": 2e-3}', encoding="utf-8")
    assert "(found by a range test)" in words.setup(RunFacts(folder))
