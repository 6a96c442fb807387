"""Whatever the texts of a run or a comparison say: the pages have the elements and links that the templates make."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from markdown_it import MarkdownIt

from dreamlora.escapes import yaml_text
from dreamlora.report import comparison_charts, document_of, svg
from dreamlora.report.document import PAGE, TEXT
from tests.fuzzing import CASES, fuzzed
from tests.report.conftest import SUMMARY, compare_example, write_comparison, write_run
from tests.test_escapes import TEXTS, Tags

OURS = {("code", ("class",)), ("wbr", ())}
"""What the page puts around flags and joints of names."""
LINKS = {"config.yaml", "metrics.jsonl", "grid.png", "timelapse.webp", "samples", "best", "report.html", "compare.json"}


@pytest.fixture(scope="module", autouse=True)
def no_drawing() -> Iterator[None]:
    """Charts take most of the time; their labels are what is looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dreamlora.report.charts.chart", lambda name, label, *_: svg.Chart(name, label, "<svg></svg>"))
        patch.setattr(comparison_charts, "chart", lambda name, label, *_: svg.Chart(name, label, "<svg></svg>"))
        yield


def elements(files: Mapping[str, str]) -> tuple[set[Any], set[Any], set[str]]:
    """Tags with their attributes in both files, and where their links lead."""
    pages = files[PAGE], MarkdownIt("gfm-like", {"linkify": False}).render(files[TEXT])
    tags = [Tags(page).tags for page in pages]
    links = {value for page in pages for tag, value in linked(page) if not value.startswith(("data:image/webp;", "#"))}
    return set(tags[0]), set(tags[1]), links


def linked(page: str) -> list[tuple[str, str]]:
    class Links(Tags):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend((tag, value or "") for name, value in attrs if name in ("href", "src", "srcset", "action"))

    found: list[tuple[str, str]] = []
    Links(page)
    return found


def only_ours(files: Mapping[str, str], usual: tuple[set[Any], set[Any], set[str]]) -> None:
    page, text, links = elements(files)
    known_page, known_text, known_links = usual
    assert page <= known_page | OURS and text <= known_text
    assert all(link in known_links | LINKS | {"data:,"} or link.startswith("runs/") for link in links)
    for content in files.values():
        content.encode("utf-8")
        assert not any(one in content for one in "\x1b\0\u202e\u2066\x85\x9b\u2028")


def run_with(folder: Any, text: str) -> Mapping[str, str]:
    """The files of a report of a run whose texts all are ``text``."""
    options = {"max_train_steps": 300, "optimizer": text, "instance_prompt": text, "lora_layers": [text, text]}
    folder.config_file.write_text(yaml_text({**options, "pretrained_model_name_or_path": text}), encoding="utf-8")
    told = {"warnings": [text], "device": text, "git_commit": text, "ended_early": text, "command": f"x --a {text}"}
    about = {
        "versions": {text: text},
        "timings": {text: 1.5},
        "peak_memory": {text: {"resident": 1.5}},
        "eval_price": {"sentence": text, "seconds": 1.0},
    }
    summary = {**SUMMARY, **told, **about, "parity": {"reason": text}}
    folder.summary_file.write_text(json.dumps(summary), encoding="utf-8")
    folder.outline_file.write_text(json.dumps({"model": text, text: text}), encoding="utf-8")
    folder.best.mkdir(exist_ok=True)
    folder.selection_file.write_text(json.dumps({"step": 250, "reason": text}), encoding="utf-8")
    sample = {"step": 0, "prompt_index": 0, "image_index": 0, "prompt": text, "seed": 1, "file": text}
    folder.samples_file.write_text(json.dumps(sample) + "\n", encoding="utf-8")
    rows = [{"step": step, "name": f"img/{text}", "value": 0.5, "n": 4, "encoder_id": text} for step in (0, 300)]
    rows += [{"step": step, "name": f"lora/dw_norm/{text}", "value": 0.5} for step in (0, 300)]
    rows += [{"step": step, "name": "eval/loss", "value": 0.5} for step in (0, 250, 300)]
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return document_of(folder.path).render()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_run(tmp_path_factory.mktemp("run") / "run")
    folder.grid_file.unlink()
    folder.timelapse_file.unlink()
    return folder


@functools.cache
def usual_of(source: Any) -> tuple[set[Any], set[Any], set[str]]:
    """What is in the files if their texts are harmless."""
    with_texts = comparison_with if isinstance(source, Path) else run_with
    return elements(with_texts(source, "word --flag"))


@settings(fuzzed, max_examples=CASES // 4)
@given(TEXTS)
def test_fuzz_texts_of_a_run(run: Any, text: str) -> None:
    only_ours(run_with(run, text), usual_of(run))


def renamed(value: Any, text: str, labels: list[str], key: str = "") -> Any:
    """A comparison in which all free texts are ``text``, and all methods are called so."""
    if isinstance(value, dict):
        return {name: renamed(own, text, labels, name) for name, own in value.items()}
    if isinstance(value, list):
        return [renamed(own, text, labels, key) for own in value]
    if value in labels:
        return f"{labels.index(value)}{text}"
    free = ("name", "sentence", "prompt", "warnings", "message", "id", "report", "command", "model", "data", "device")
    more = ("budget", "reason", "git_commit", "suffixes", "encoder_id", "metric", "options", "settings", "verdict")
    return text if isinstance(value, str) and key in (*free, *more) else value


def comparison_with(folder: Path, text: str) -> Mapping[str, str]:
    example = compare_example()
    example["methods"], example["runs"] = example["methods"][:2], example["runs"][:3]
    labels = [method["label"] for method in example["methods"]]
    content = renamed(example, text, labels)
    content["runs"] = [
        {**found, "report": text, "message": text, "command": f"x {text}"} for found in content["runs"][:3]
    ]
    (folder / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    return {name: file for name, file in document_of(folder).render().items() if name in (PAGE, TEXT)}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_comparison(tmp_path_factory.mktemp("comparison") / "a")
    for picture in folder.rglob("*.png"):
        picture.unlink()
    return folder


@settings(fuzzed, max_examples=CASES // 4)
@given(TEXTS)
def test_fuzz_texts_of_a_comparison(comparison: Path, text: str) -> None:
    files = comparison_with(comparison, text)
    page, written, links = elements(files)
    known_page, known, known_links = usual_of(comparison)
    assert written <= known
    assert page <= known_page | OURS
    for link in links - known_links - LINKS:
        assert ":" not in link and not link.startswith("/") and ".." not in link.split("/"), link
    for content in files.values():
        content.encode("utf-8")


@pytest.mark.parametrize(
    "report",
    [
        "javascript:alert(1)",
        "data:text/html,x",
        "//evil.example/x",
        "https://evil.example",
        "/etc/passwd",
        "..",
        "\\\\h",
    ],
)
def test_links_of_a_comparison_stay_in_its_folder(report: str, comparison: Path) -> None:
    document = comparison_with(comparison, report)
    links = [value for tag, value in linked(document[PAGE]) if tag == "a"]
    assert report not in links and all("//" not in link and ":" not in link for link in links)


def test_code_of_a_report_is_code_whatever_it_says(run: Any) -> None:
    """Backticks once ended it."""
    files = run_with(run, "\n```\n<script>alert(1)</script>\n\n# x")
    rendered = MarkdownIt("commonmark").render(files[TEXT])
    assert "<script" not in rendered and "&lt;script&gt;" in rendered and rendered.count("<h1") == 1


def test_all_that_templates_show_is_escaped(make_run: Callable[..., Any]) -> None:
    """By the environment, not by every place: one that is forgotten would show it."""
    folder = make_run()
    rows = [{"step": step, "name": "img/x", "value": 1.0, "n": "<b>", "encoder_id": "|<i>"} for step in (0, 1)]
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = document_of(folder.path).render()
    assert "<b>" not in files[TEXT] + files[PAGE] and "<i>" not in files[TEXT] + files[PAGE]
