"""Damaged and hostile runs and comparisons: what cannot be used is named and left out, the rest is shown."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamlora.compare.numbers import _samples as samples_of
from dreamlora.compare.records import read_record
from dreamlora.errors import UserError
from dreamlora.report import comparison_charts, comparison_tables, document_of, words
from dreamlora.report.charts import evaluation_chart
from dreamlora.report.comparison import ComparisonFile
from dreamlora.report.comparison_samples import gallery
from dreamlora.report.facts import RunFacts, readable_command
from dreamlora.runfolder import RunFolder
from tests.fuzzing import CASES, as_json, changed, damaged, fuzzed, harmless
from tests.report.conftest import SUMMARY, compare_example, write_comparison, write_run

SELECTION = {"schema_version": 1, "step": 225, "reason": "the lowest loss", "vetoed": {"100": "why"}}
TRIED = {"learning_rate": 2e-3, "value": 0.4, "difference": -0.1, "standard_error": 0.01}
RANGE_TEST = {"learning_rate": 1e-3, "reason": "the lowest loss", "start": 0.5, "steps": 12, "tried": [TRIED, TRIED]}
OUTLINE = {"model": "the embedded model", "images": "5 images"}
OUTCOME = {"status": "finished", "message": "", "method": "adamw"}
PRICE = {"forwards": 10, "share": 0.1, "sentence": "10 forwards.", "seconds": 2.0}
CALL = {"effect": 0.1, "error": 0.01, "rounding": 0.001, "scale": 1.0}
WHOLE = {
    **SUMMARY,
    "parity": {**SUMMARY["parity"], "call": CALL},
    "eval_price": PRICE,
    "warnings": ["a warning"],
    "ended_early": "at step 5",
    "made": {"steps": 300, "settings": {"rank": 4}, "wanted": {"prompts": ["a"]}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = write_run(tmp_path_factory.mktemp("hostile") / "run", steps=30)
    folder.best.mkdir()
    return folder


def everything(folder: RunFolder) -> list[Any]:
    """All that the report says of a run, without its charts."""
    facts = RunFacts(folder)
    told: list[Any] = [facts.warnings, facts.options, facts.command, facts.model, facts.prompts, facts.speed]
    told += [words.headline(facts), words.spread(facts), words.setup(facts), words.numbers(facts), words.best(facts)]
    told += [
        words.final_table(facts),
        words.image_table(facts),
        words.range_table(facts),
        words.parity(facts),
        words.evaluation_price(facts),
    ]
    told += [words.health(facts), words.seconds_of(facts), facts.outline, read_record(folder.path, "run")]
    return told


def written(file: Path, content: bytes, read: Callable[[], Any]) -> None:
    """Read with other content in one of the files, and put that back."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        harmless(read)
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def lines(rows: list[Any]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def rows_in(file: Path, count: int) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]


@fuzzed
@given(st.data())
def test_fuzz_metrics(run: RunFolder, data: st.DataObject) -> None:
    sound = [
        *rows_in(run.metrics_file, 8),
        {"step": 5, "name": "img/clip_t", "value": 0.3, "n": 4, "n_other": 2, "encoder_id": "clip", "images_id": "a"},
        {"step": 30, "name": "eval/final_loss", "value": 0.3, "evalset_id": "ab", "at_end": True},
    ]
    content = data.draw(st.one_of(changed(sound).map(lines), damaged(lines(sound))))
    written(run.metrics_file, content, lambda: everything(run))


@fuzzed
@given(st.data())
def test_fuzz_samples(run: RunFolder, data: st.DataObject) -> None:
    more = {"num_inference_steps": 20, "guidance_scale": 3.0, "scheduler": "DDIM", "negative_prompt": "blue"}
    sound = [{**row, **more} for row in rows_in(run.samples_file, 4)]
    content = data.draw(st.one_of(changed(sound).map(lines), damaged(lines(sound))))

    record = read_record(run.path, "run")

    def read() -> None:
        _ = RunFacts(run).prompts
        samples_of(record, run.sample_rows(), run.path)

    written(run.samples_file, content, read)


@fuzzed
@given(st.data())
def test_fuzz_config(run: RunFolder, data: st.DataObject) -> None:
    options = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    content = data.draw(st.one_of(changed(options).map(as_json), damaged(run.config_file.read_bytes())))
    written(run.config_file, content, lambda: everything(run))


@pytest.mark.parametrize(
    ("name", "sound"),
    [
        ("summary_file", WHOLE),
        ("selection_file", SELECTION),
        ("range_test_file", RANGE_TEST),
        ("outline_file", OUTLINE),
        ("outcome_file", OUTCOME),
        ("base_model_file", {"id": "a", "revision": None}),
    ],
)
def test_fuzz_objects(name: str, sound: dict[str, Any], run: RunFolder) -> None:
    @settings(fuzzed, max_examples=max(CASES // 3, 1))
    @given(st.one_of(changed(sound).map(as_json), damaged(as_json(sound))))
    def check(content: bytes) -> None:
        written(getattr(run, name), content, lambda: (everything(run), run.base_model()))

    check()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("hostile") / "comparison")


@fuzzed
@given(st.one_of(changed(compare_example()).map(as_json), damaged(as_json(compare_example()))))
def test_fuzz_compare_json(comparison: Path, content: bytes) -> None:
    def read() -> None:
        found = ComparisonFile(comparison)
        comparison_tables.all_of(found)
        gallery(found)
        _ = found.findings, found.setup, found.warnings, found.command, found.commands

    written(comparison / "compare.json", content, read)


def odd(**changes: Any) -> dict[str, Any]:
    return {**WHOLE, **changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timings": {"training": "long"}}, "timings.training: Input should be a valid number (got 'long')"),
        (
            {"peak_memory": {"training": {"allocated": "much"}}},
            "peak_memory.training.allocated: Input should be a valid",
        ),
        ({"timings": [1, 2]}, "timings: Input should be a valid dictionary (got a list of 2)"),
        ({"lora": {"parameters": 10**18}}, "lora.parameters: Input should be less than or equal to"),
        ({"parity": {"psnr_db": "high"}}, "parity.psnr_db"),
        ({"parity": {"psnr_db": 40.0, "call": {"rounding": 0.1}}}, "parity.call"),
        ({"eval_price": {"seconds": 3}}, "eval_price"),
        ({"warnings": "none"}, "warnings"),
        (
            {"made": {"steps": -5, "settings": {}, "wanted": {}}},
            "made.steps: Input should be greater than or equal to 0",
        ),
        ({"command": ["rm"]}, "command"),
        ({"versions": {"torch": 2}}, "versions.torch"),
    ],
)
def test_a_field_that_cannot_be_right_is_named_and_all_others_are_shown(
    changes: dict[str, Any], named: str, make_run: Callable[..., RunFolder]
) -> None:
    folder = make_run(summary=odd(**changes))
    facts = RunFacts(folder)
    [warning] = [text for text in facts.warnings if str(folder.summary_file) in text]
    assert named in warning and warning.endswith("It is left out.")
    page = document_of(folder.path).write().read_text(encoding="utf-8")
    assert "steps were trained" in page or "The loss on" in page
    assert facts.summary.keys() == WHOLE.keys() - changes.keys() & facts.summary.keys()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b]",
        "a: &a [*a]",
        "[" * 100_000,
        "rank: !!python/object/apply:os.system [id]",
        "x: " + "9" * 5000,
        "x: '" + "a" * 300_000 + "'",
    ],
    ids=["aliases", "a list in itself", "deep", "a tag", "a huge number", "a huge text"],
)
def test_a_config_that_is_no_config_is_one_sentence(text: str, make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    folder.config_file.write_text(text, encoding="utf-8")
    error = harmless(lambda: document_of(folder.path).render())
    assert isinstance(error, UserError) and str(error).startswith(f"cannot read {folder.config_file}: ")
    assert len(str(error)) < 400


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "samples/samples.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_file_of_the_run_is_not_read(
    name: str, kind: str, make_run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    folder = make_run()
    file = folder.path / name
    secret = tmp_path / "secret"
    file.rename(secret)
    {"pipe": os.mkfifo, "link": lambda path: path.symlink_to(secret), "folder": Path.mkdir}[kind](file)
    told = harmless(lambda: "\n".join(RunFacts(folder).warnings))
    assert f"cannot read {file}: " in str(told)


@pytest.mark.parametrize("value", [0.0, -0.4, 5e-324, 3e38])
def test_a_loss_that_is_the_same_all_along_is_drawn_without_a_word(
    value: float, make_run: Callable[..., RunFolder], recwarn: pytest.WarningsRecorder
) -> None:
    folder = make_run(steps=50)
    rows = [{**row, "value": value} for row in folder.metrics()]
    folder.metrics_file.write_bytes(lines(rows))
    assert "<svg" in evaluation_chart(RunFacts(folder))
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_of_ever_so_many_metrics_the_first_are_shown_and_that_is_told(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(steps=50)
    of_images = {"step": 50, "value": 0.3, "n": 4, "encoder_id": "clip"}
    with folder.metrics_file.open("ab") as file:
        file.write(lines([{**of_images, "name": f"img/m{number}"} for number in range(6000)]))
    facts = RunFacts(folder)
    assert facts.evaluation is not None and 4000 < len(facts.image_metrics) < 5000
    assert [text for text in facts.warnings if "all but 5,000 are left out" in text]
    assert read_record(folder.path, "run").damage == tuple(folder.damage())


def test_more_text_than_a_page_can_show_is_left_out(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(summary=odd(warnings=["--flag " * 9000] * 200))
    [warning] = [text for text in RunFacts(folder).warnings if str(folder.summary_file) in text]
    assert "it has more than the 4 MiB that such a file can have" in warning


@pytest.mark.parametrize("command", ["a=" * 500_000, '"' + "a:" * 500_000, "--flag value " * 80_000])
def test_a_command_of_a_megabyte_is_not_taken_apart(command: str) -> None:
    began = time.process_time()
    assert str(readable_command(command)).startswith("(a command line of 1,0")
    assert time.process_time() - began < 1


@pytest.mark.parametrize("value", ["inf", "-inf", 1e300])
def test_levels_that_no_chart_reaches_are_not_drawn(value: Any, comparison: Path) -> None:
    content = {**compare_example(), "base_loss": value, "target": value}
    content["runs"] = [{**run, "seconds": [value] * len(run["steps"])} for run in content["runs"]]

    def draw() -> None:
        found = ComparisonFile(comparison)
        assert comparison_charts.all_of(found) and comparison_tables.all_of(found)

    written(comparison / "compare.json", as_json(content), draw)


def test_pictures_of_a_comparison_lie_in_its_folder(make_comparison: Callable[..., Path], tmp_path: Path) -> None:
    methods = compare_example()["methods"]
    for method, file in zip(methods, ("/etc/passwd", "../secret.png", "a/../../secret.png"), strict=False):
        if method["samples"]:
            for cell in method["samples"]["cells"]:
                cell["file"] = file
            method["samples"]["references"] = [file]
    (tmp_path / "secret.png").write_bytes(b"secret")
    content = {**compare_example(), "methods": methods}
    folder = make_comparison()
    (folder / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    shown = gallery(ComparisonFile(folder))
    assert shown is not None and not shown.references
    reasons = {shot.reason for view in shown.views for row in view.rows for shot in row if shot.picture is None}
    assert any("outside the comparison's folder" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"baseline": "nobody"}, "baseline: there is no method 'nobody'"),
        ({"methods": []}, "methods: every one must have a label of its own"),
        ({"base_loss": "low"}, "base_loss"),
        ({"runs": [{}]}, "runs.0.id: Field required"),
        ({"complete": "yes"}, "complete: Input should be a valid boolean"),
    ],
)
def test_a_comparison_that_cannot_be_right_is_one_sentence(
    change: dict[str, Any], named: str, make_comparison: Callable[..., Path]
) -> None:
    folder = make_comparison()
    file = folder / "compare.json"
    file.write_text(json.dumps({**compare_example(), **change}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        ComparisonFile(folder)
    assert named in str(caught.value) and "\n" not in str(caught.value)
