"""A comparison's report: what compare.json says, nothing else, with warnings where the numbers stand."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dreamlora.__main__ import main
from dreamlora.compare import numbers, stats
from dreamlora.compare.verdict import delta_sentence, table
from dreamlora.errors import UserError
from dreamlora.figures import amount, interval, loss, percent, rate, spread
from dreamlora.report import comparison_charts, comparison_tables, document_of, svg, write_compare_report
from dreamlora.report.comparison import ComparisonFile
from dreamlora.report.comparison_samples import gallery
from tests.report.conftest import compare_example, write_comparison
from tests.report.test_page import checked


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its report."""
    folder = write_comparison(tmp_path_factory.mktemp("written") / "adamw-vs-scaled_adamw")
    write_compare_report(folder)
    return folder


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take most of a report's time; not every test is about them."""
    monkeypatch.setattr(comparison_charts, "all_of", lambda comparison: {})


CHARTS = ("delta", "curves", "curves_end", "rates", "octiles")


def data_of(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="compare-json">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def method(label: str, **changes: Any) -> list[dict[str, Any]]:
    """The example's methods, with one changed."""
    methods = compare_example()["methods"]
    assert label in [found["label"] for found in methods]
    return [{**found, **changes} if found["label"] == label else found for found in methods]


def texts(table: comparison_tables.Table) -> dict[str, list[str]]:
    """A table's rows, notes behind the text, by the row's first entry."""
    return {row[0].text: [" ".join((entry.text, *entry.notes)) for entry in row[1:]] for row in table.rows}


def test_the_page_is_well_formed_and_needs_no_network(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    found = checked(html)
    assert all(address.startswith(("data:", "#")) or address == "compare.json" for address in found.addresses)
    assert len(found.ids) == len(set(found.ids))
    assert not found.images_without_text
    assert not re.search(r"https?://(?!www\.w3\.org)|url\((?!#)|@import", html.partition('id="compare-json"')[0])
    assert html.count('<svg role="img"') == 5 == len(list((written / "plots").glob("*.svg")))


def test_the_verdict_comes_first_and_warnings_stand_by_their_numbers(make_comparison: Callable[..., Path]) -> None:
    comparison = ComparisonFile(make_comparison())
    assert comparison.findings[0].startswith("scaled_adamw:variant=split: loss −3.6\u202f% [−4.0, −3.2] against adamw")
    assert comparison.findings[1].startswith("sgd: loss +8.5\u202f%")
    rows = texts(comparison_tables.results(comparison))
    assert rows["scaled_adamw:variant=split"][:4] == ["better", "−3.6\u202f% [−4.0, −3.2]", "0.04\u202f%", "5 of 5"]
    assert rows["adamw"][:4] == ["baseline", "–", "–", "–"]
    assert rows["sgd"][0] == "worse LR grid edge (sgd)"
    assert rows["sgd"][-1] == "20 at the upper edge of the grid try 63.3, 200"


def test_a_method_that_was_not_tuned_or_diverged_says_so(make_comparison: Callable[..., Path]) -> None:
    changes = {"tuned": False, "headline_seeds": [3, 4], "headline_diverged": 1}
    rows = texts(comparison_tables.results(ComparisonFile(make_comparison(methods=method("adamw", **changes)))))
    assert rows["adamw"][0] == "baseline not tuned 1 of 2 seeds diverged or failed few seeds"
    assert "1 of 2 seeds diverged or failed" in rows["adamw"][4]


def test_both_figures_of_a_method_that_failed_in_a_seed_stand_side_by_side(
    make_comparison: Callable[..., Path],
) -> None:
    methods = method("sgd")
    methods[2]["delta"]["pct"] = {"mean": "inf", "low": None, "high": None, "n": 5}
    methods[2]["delta"]["ended"] = {"mean": -2.0, "low": -3.0, "high": -1.0, "n": 4}
    methods[2]["delta"]["pairs"][0]["pct"] = "inf"
    methods[2]["log_auc"]["max"] = "inf"
    comparison = ComparisonFile(make_comparison(methods=methods))
    assert texts(comparison_tables.speed(comparison))["sgd"][-1].endswith(", ∞]")
    rows = texts(comparison_tables.results(comparison))
    assert rows["sgd"][1] == "∞ −2.0\u202f% [−3.0, −1.0] in the 4 of 5 seeds that both ended"
    assert comparison.findings[-1].startswith("sgd")
    chart = comparison_charts.deltas(comparison)
    assert chart is not None and "sgd (without 1 of 5 seeds that failed)" in chart.inline


LONG = "scaled_adamw:variant=split,scale_correction=true,betas=0.9,0.999+lora_units=start"


@pytest.mark.parametrize("label", ["sgd", LONG, LONG[:13] + "x" * 300], ids=["short", "long", "longest"])
def test_nothing_is_drawn_through_a_methods_name(
    label: str, make_comparison: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names have rows of their own, within the picture; and the axes keep their width beside long ones."""
    seen: list[bool] = []

    def looked_at(figure: Any) -> None:
        axes = figure.axes[0]
        figure.draw_without_rendering()
        renderer = figure._get_renderer()
        names = [text.get_window_extent(renderer) for text in axes.texts]
        drawn = [artist.get_window_extent(renderer) for artist in (*axes.lines, *axes.collections)]
        assert len(names) == 2
        for name in names:
            assert not any(name.y0 < other.y1 and other.y0 < name.y1 for other in drawn if other.y0 != other.y1)
            assert name.x0 >= 0 and name.x1 <= figure.bbox.width and name.y1 <= figure.bbox.height
        assert axes.get_window_extent(renderer).width > 0.9 * figure.bbox.width
        seen.append(True)

    original = svg._bound
    monkeypatch.setattr(svg, "_bound", lambda figure: (original(figure), looked_at(figure)))
    methods = compare_example()["methods"]
    methods[2]["label"] = label
    chart = comparison_charts.deltas(ComparisonFile(make_comparison(methods=methods)))
    assert chart is not None and seen


def test_long_names_are_broken_on_the_page_too(make_comparison: Callable[..., Path]) -> None:
    methods = compare_example()["methods"]
    methods[1]["label"], methods[1]["delta"]["sentence"] = LONG, f"{LONG}: loss +2.1 % against adamw"
    page = write_compare_report(make_comparison(methods=methods)).read_text(encoding="utf-8")
    broken = "scaled_adamw:<wbr>variant=split,<wbr>scale_correction=true,<wbr>betas=0.9,0.999+<wbr>lora_units=start"
    assert f"{broken}:<wbr> loss +2.1" in page, "in the verdict"
    assert re.search(rf"<th[^>]*>.*{re.escape(broken)}</", page), "in the tables"


def test_losses_far_above_the_base_models_do_not_squeeze_the_picture() -> None:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0.4, 1e6])
        comparison_charts._crop(axes, 0.5)
        assert axes.get_ylim()[1] == pytest.approx(0.625)

    svg.chart("x", "x", draw)


def test_below_three_seeds_there_is_no_interval(make_comparison: Callable[..., Path]) -> None:
    methods = method("sgd")
    methods[2]["delta"] |= {"pct": {"mean": 1.5, "low": None, "high": None, "n": 2}, "word": "insufficient seeds"}
    curve = methods[2]["curve"]
    curve |= {key: [None] * len(curve["steps"]) for key in ("low", "high")}
    curve["median"] = [0.4321] * len(curve["steps"])
    folder = make_comparison(methods=methods)
    assert texts(comparison_tables.results(ComparisonFile(folder)))["sgd"][:2] == [
        "insufficient seeds LR grid edge (sgd)",
        "+1.5\u202f%",
    ]
    html = write_compare_report(folder).read_text(encoding="utf-8")
    assert "insufficient seeds" in html
    assert re.search(r"at the end: adamw 0\.46\d*, scaled_adamw:variant=split 0\.44\d*, sgd 0\.4321", html)


def test_tables_tell_speed_basins_and_what_diverged(make_comparison: Callable[..., Path]) -> None:
    tables = comparison_tables.all_of(ComparisonFile(make_comparison()))
    assert list(tables) == ["results", "speed", "basins", "rates", "octiles", "images", "runs"]
    assert texts(tables["speed"])["sgd"][:3] == ["never", "0 of 5", "–"]
    assert texts(tables["speed"])["scaled_adamw:variant=split"][2] == "1.83\u202f×"
    assert texts(tables["basins"])["sgd"] == ["none", "none", "none", "≥ 1.23 (1.17 … 20)"]
    rates = [[" ".join((entry.text, *entry.notes)) for entry in row] for row in tables["rates"].rows]
    assert ["adamw", "0.02", "∞", "3 of 3"] in [row[:4] for row in rates]
    assert ["adamw", "0.002 best"] in [row[:2] for row in rates]
    assert len(tables["runs"].rows) == 60
    assert "memory" not in [head.text for head in tables["speed"].heads]  # the runs were on a CPU


def test_numbers_sort_as_numbers_and_never_comes_last(written: Path) -> None:
    speed = comparison_tables.speed(ComparisonFile(written))
    keys = [row[1].key for row in speed.rows]
    assert keys[1] < keys[0] < keys[2] == 1e308
    html = (written / "report.html").read_text(encoding="utf-8")
    assert 'data-key="1e+308"' in html and "inf" not in re.findall(r'data-key="([^"]*)"', html)


@pytest.mark.parametrize(
    ("encoders", "told"),
    [
        ((None, None), "[95 %], by an encoder that was not logged, 16 images. They"),
        (("tiny-clip", "tiny-clip"), "[95 %], by tiny-clip, 16 images. They"),
        (
            ("tiny-clip", "vits16"),
            "[95 %]: clip_t by tiny-clip, 16 images; dino by vits16, 16 images. They",
        ),
        (
            ("tiny-clip", None),
            "[95 %]: clip_t by tiny-clip, 16 images; dino by an encoder that was not logged, 16 images. They",
        ),
    ],
    ids=["none", "one", "several", "one not logged"],
)
def test_image_metrics_name_what_saw_the_images(
    encoders: tuple[str | None, str | None], told: str, make_comparison: Callable[..., Path]
) -> None:
    by = dict(zip(("img/clip_t", "img/dino"), encoders, strict=True))
    methods = compare_example()["methods"]
    for found in methods:
        found["images"] = [{**metric, "encoder_id": by[metric["name"]]} for metric in found["images"]]
    table = comparison_tables.images(ComparisonFile(make_comparison(methods=methods)))
    assert table is not None and told in table.caption.replace("\u00a0", " ")


def test_without_images_and_samples_their_sections_are_left_out(make_comparison: Callable[..., Path]) -> None:
    methods = [{**found, "images": [], "octiles": [], "samples": None} for found in compare_example()["methods"]]
    folder = make_comparison(methods=methods, command=None)
    html = write_compare_report(folder).read_text(encoding="utf-8")
    checked(html)
    assert "<img" not in html and 'id="samples"' not in html and 'id="image-metrics"' not in html
    assert not (folder / "plots" / "octiles.svg").exists()


def numbers_in(text: str) -> list[str]:
    """Every number with its sign, as it is written."""
    return re.findall(r"[+−]?\d+(?:\.\d+)?", text)


@pytest.mark.parametrize("seed", range(40))
def test_sentence_table_and_terminal_have_the_same_numbers(make_comparison: Callable[..., Path], seed: int) -> None:
    """Of random intervals, around zero too: same signs, same orientation, same digits."""
    draw = random.Random(seed)
    size = 10 ** draw.uniform(-2, 2)
    ours = [100 * math.exp(draw.gauss(0, size / 100)) for _ in range(draw.randint(1, 6))]
    delta = stats.paired_delta(ours, [100.0] * len(ours))
    sentence = delta_sentence("other", "adamw", delta, 0, "inconclusive")
    methods = compare_example()["methods"]
    methods[1]["delta"] |= {
        "pct": numbers.interval(delta.pct),
        "ended": numbers.interval(delta.ended),
        "sentence": sentence,
    }
    comparison = ComparisonFile(make_comparison(methods=methods))
    (row,) = (row for row in comparison_tables.results(comparison).rows if row[0].text == methods[1]["label"])
    told = re.search(r"loss (.*) against adamw", sentence)
    assert told is not None and told[1] == row[2].text
    (line,) = (line for line in table(comparison.raw).splitlines() if line.startswith(methods[1]["label"]))  # type: ignore[arg-type]
    assert told[1] in line
    found = numbers_in(told[1])
    assert len(found) == (3 if len(ours) > 2 else 1)
    values = [delta.pct.mean, delta.pct.low, delta.pct.high][: len(found)]
    assert all(
        float(text.replace("−", "-")) == pytest.approx(value, abs=0.5, rel=0.06)
        for text, value in zip(found, values, strict=True)
    )


@pytest.mark.usefixtures("no_charts")
def test_missing_samples_become_cells_with_a_reason(make_comparison: Callable[..., Path]) -> None:
    methods = compare_example()["methods"]
    methods[1]["samples"]["cells"][1]["file"] = None
    del methods[1]["samples"]["cells"][2]
    folder = make_comparison(methods=methods)
    (folder / methods[2]["samples"]["cells"][0]["file"]).unlink()
    found = gallery(ComparisonFile(folder))
    assert found is not None and found.steps == (0, 75, 150) and len(found.views) == 2
    reasons = [[[shot.reason for shot in row] for row in view.rows] for view in found.views]
    assert reasons[0] == [["", "", "file is missing"], ["", "not drawn", ""], ["", "", ""]]
    assert reasons[1] == [["", "not drawn", ""], ["", "", ""], ["", "", ""]]
    assert found.views[0].rows[2][0].loss == "0.4608"
    html = write_compare_report(folder).read_text(encoding="utf-8")
    assert html.count('<div class="missing">') == 3


@pytest.mark.parametrize("other", [{"prompt": "a cat"}, {"seed": 7}, {"settings": ["guidance 1"]}])
def test_other_prompts_seeds_and_settings_do_not_stand_beside_each_other(
    make_comparison: Callable[..., Path], other: dict[str, Any]
) -> None:
    """The second method's pictures with the first one's numbers are of something else."""
    methods = compare_example()["methods"]
    cells = methods[1]["samples"]["cells"]
    methods[1]["samples"]["cells"] = [{**cell, **other} if cell["prompt_index"] == 0 else cell for cell in cells]
    found = gallery(ComparisonFile(make_comparison(methods=methods)))
    assert found is not None and len(found.views) == 3
    reasons = {(view.prompt, view.seed, view.settings): [shot.reason for shot in view.rows[0]] for view in found.views}
    assert sorted(reasons.values()) == [["", "", ""], ["", "not drawn", ""], ["not drawn", "", "not drawn"]]


def test_many_steps_are_thinned_out_and_that_is_said(make_comparison: Callable[..., Path]) -> None:
    methods = compare_example()["methods"]
    cells = methods[0]["samples"]["cells"]
    methods[0]["samples"]["cells"] = [{**cell, "step": step} for step in range(0, 200, 10) for cell in cells[:2]]
    found = gallery(ComparisonFile(make_comparison(methods=methods)))
    assert found is not None and len(found.steps) == 8 and found.steps[0] == 0 and found.steps[-1] == 190
    assert found.left_out == "Shown: 8 of 21 steps."


@pytest.mark.usefixtures("no_charts")
def test_texts_from_outside_are_escaped_and_the_json_is_whole(make_comparison: Callable[..., Path]) -> None:
    methods = compare_example()["methods"]
    evil = "</script><script>alert(1)</script><!-- *x* | y"
    for found in methods:
        for cell in found["samples"]["cells"]:
            cell["prompt"] = evil
    folder = make_comparison(methods=methods, name=evil, warnings=[f"{evil} --flag"])
    html = write_compare_report(folder).read_text(encoding="utf-8")
    checked(html)
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "<!-- *x*" not in html
    assert "&lt;/script&gt;" in html and '<code class="flag">--flag</code>' in html
    assert data_of(html)["methods"][0]["samples"]["cells"][0]["prompt"] == evil
    assert data_of(html) == json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_charts")
def test_secrets_of_commands_are_hidden_everywhere(make_comparison: Callable[..., Path]) -> None:
    runs = compare_example()["runs"]
    runs[0]["command"] += " --hub_token hf_secret"
    folder = make_comparison(command="dreamlora compare --hub_token=hf_secret", runs=runs)
    html = write_compare_report(folder).read_text(encoding="utf-8")
    assert "hf_secret" not in html + (folder / "report.md").read_text(encoding="utf-8")
    assert "dreamlora compare --hub_token=***" in html


def test_the_report_of_the_same_comparison_is_the_same(written: Path) -> None:
    files = {name: (written / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")}
    plots = {f"plots/{name}.svg": (written / "plots" / f"{name}.svg").read_text(encoding="utf-8") for name in CHARTS}
    assert document_of(written).render() == {**files, **plots}


def test_charts_are_whole_inside_and_outside_the_page(written: Path) -> None:
    charts = comparison_charts.all_of(ComparisonFile(written))
    assert tuple(charts) == CHARTS
    for chart in charts.values():
        inline, file = ElementTree.fromstring(chart.inline), ElementTree.fromstring(chart.file)
        assert inline.get("role") == file.get("role") == "img" and inline.get("aria-label") == chart.label
        assert "currentColor" in chart.inline and "#010203" not in chart.inline + chart.file
        assert file.get("width") and not inline.get("width")
        assert file[0].get("fill") == "#ffffff" and "currentColor" not in chart.file
    assert "scaled_adamw:variant=split: loss −3.6\u202f% [−4.0, −3.2] against adamw" in charts["delta"].label
    assert "adamw 0.46" in charts["curves"].label
    assert "sgd best at 20" in charts["rates"].label


def test_rates_that_runs_found_are_told_as_such(make_comparison: Callable[..., Path]) -> None:
    methods = method("sgd")
    methods[2] |= {"best_lr": None, "found_lrs": [1.6e-3, 2e-3, 2.4e-3], "rates": [], "lr_basin": []}
    methods[2] |= {"at_grid_edge": None, "suggested_lrs": []}
    methods[1] |= {"optimizer": "prodigy", "best_lr": 1.0}
    comparison = ComparisonFile(make_comparison(methods=methods, same_lr=[]))
    tables, charts = comparison_tables.all_of(comparison), comparison_charts.all_of(comparison)
    assert texts(tables["results"])["sgd"][-1] == "found by each run, 0.0016 to 0.0024"
    assert texts(tables["results"])["scaled_adamw:variant=split"][-1].startswith("1 × what it finds")
    assert "sgd" not in texts(tables["basins"]) and "sgd" not in texts(tables["rates"])
    assert "sgd" not in charts["rates"].label
    page = write_compare_report(comparison.folder)
    for file in (page, page.with_suffix(".md")):
        assert "found by each run, 0.0016 to 0.0024" in file.read_text(encoding="utf-8")


def test_where_all_runs_found_their_rates_nothing_is_said_of_basins(make_comparison: Callable[..., Path]) -> None:
    methods = compare_example()["methods"]
    for one in methods:
        one |= {"best_lr": None, "found_lrs": [2e-3, 2e-3], "rates": [], "lr_basin": [], "at_grid_edge": None}
    page = write_compare_report(make_comparison(methods=methods, same_lr=[]))
    assert "Every learning rate that was tried" not in page.read_text(encoding="utf-8")
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "Decades of learning rates" not in text and text.count("found by each run, 0.002 |") == len(methods)


def test_a_comparison_that_goes_on_says_how_far_it_is(make_comparison: Callable[..., Path]) -> None:
    runs = compare_example()["runs"]
    for run in runs[:20]:
        run["status"] = "planned"
    dropped = [{"run": "runs/x", "reason": "another evaluation set"}]
    warnings = ComparisonFile(make_comparison(complete=False, runs=runs, dropped=dropped)).warnings
    assert warnings[0] == "Not complete: 40 runs have ended, others are to come. The numbers will change."
    assert warnings[-1] == "Left out: runs/x (another evaluation set)."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, r"there is no comparison in .*: compare\.json is missing"),
        ("{", r"cannot read .*compare\.json"),
        ("[]", "Input should be a valid dictionary"),
        ('{"schema_version": 1}', "has schema_version 1; this dreamlora reads 2"),
        ('{"schema_version": 2, "name": "x"}', "complete: Field required. Compare anew"),
    ],
)
def test_what_is_no_comparison_is_refused(text: str | None, problem: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "compare.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        write_compare_report(tmp_path)


def test_the_command_knows_comparisons(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(written)]) == 0
    assert capsys.readouterr().out.strip() == str(written / "report.html")
    text = (written / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert "loss −3.6 % [−4.0, −3.2] against adamw" in " ".join(text.split()) and "](plots/rates.svg)" in text
    assert "| sgd | worse ⚠ LR grid edge (sgd) |" in text


def test_how_numbers_are_written() -> None:
    assert [percent(value) for value in (0.123, -3.0, 250, None, "inf")] == [
        *("+0.12\u202f%", "−3.0\u202f%", "+250\u202f%", "–", "∞")
    ]
    assert [rate(value) for value in (1e-5, 3.16e-3, 20.0, None)] == ["1e-5", "0.00316", "20", "–"]
    assert [amount(value) for value in (-0.1394, 1234.5, "inf", None)] == ["−0.139", "1234", "never", "–"]
    assert [loss(value) for value in (0.46022, "inf", None)] == ["0.4602", "∞", "–"]
    assert spread({"median": 1.0, "min": 0.5, "max": "inf", "n": 3}) == "1.000 [0.5000, ∞]"
    assert interval({"mean": -2.0, "low": None, "high": None, "n": 2}) == "−2.0\u202f%"


def test_many_names_make_a_chart_higher_instead_of_squeezing_the_lines() -> None:
    def height(names: int) -> float:
        def draw(axes: Any) -> None:
            for number in range(names):
                axes.plot([0, 1], [0, number], label=f"scaled_adamw:variant=split {number}")
            svg.legend(axes)

        box = re.search(r'viewBox="0 0 [0-9.]+ ([0-9.]+)"', svg.chart("x", "x", draw).drawn)
        assert box is not None
        return float(box[1])

    assert height(8) - height(2) == pytest.approx(6 * 0.21 * 72)
