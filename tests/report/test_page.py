"""The two files as a reader gets them: complete, self-contained, safe, also from half a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from dreamlora.__main__ import main
from dreamlora.report import write_report
from dreamlora.runfolder import RunFolder

VOID = {"meta", "link", "img", "source", "br", "hr", "input", "wbr"}


class Checker(HTMLParser):
    """Collects addresses and ids, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.images_without_text = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [found[key] or "" for key in ("src", "srcset", "href", "xlink:href") if key in found]
        self.ids += [found["id"] or ""] if "id" in found else []
        self.images_without_text += tag == "img" and not found.get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


@pytest.mark.parametrize("arguments", [{}, {"name": "eval/loss_train", "steps": 120, "summary": None}])
def test_the_page_is_well_formed_and_needs_no_network(arguments: dict, make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(**arguments)
    found = checked(write_report(folder).read_text(encoding="utf-8"))
    local = {"grid.png", "#main", "config.yaml", "metrics.jsonl", "timelapse.webp", "samples"}
    assert all(address.startswith(("data:", "#")) or address in local for address in found.addresses)
    assert all((folder.path / address).exists() for address in local - {"#main"} if address in found.addresses)
    assert len(found.ids) == len(set(found.ids))
    assert not found.images_without_text


def test_both_files_tell_the_facts(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    html = write_report(folder.path).read_text(encoding="utf-8")
    for text in (html, folder.report_md.read_text(encoding="utf-8").replace("\\", "")):
        assert "The loss on 5 held-out images fell from 0.5000" in text
        assert "lower than the base model" in text
        assert "draws the image seen in training but for rounding" in text
        assert "scaled_adamw" in text and "1 min 50 s" in text
        assert "in tensors on the GPU" in text and "8.25" in text and "held of the GPU" in text
        assert "hf_secret" not in text
        assert "moved the weights by ‖ΔW‖ = 2, 66% of it (of the square) in up_blocks. Stable rank" in text
    assert html.count('<svg role="img"') == 5


def test_texts_from_outside_are_escaped(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    folder.config_file.write_text("instance_prompt: '<script>alert(2)</script> | *x*'\n", encoding="utf-8")
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html  # a prompt, in the grid's description
    assert r"&lt;script&gt;alert(2)&lt;/script&gt; &#124; \*x\*" in folder.report_md.read_text(encoding="utf-8")


def test_the_report_of_the_same_folder_is_the_same(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    assert write_report(folder).read_text(encoding="utf-8") == write_report(folder).read_text(encoding="utf-8")


def test_a_run_that_has_only_begun_has_a_report(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    config = folder.config_file.read_text(encoding="utf-8")
    folder.clear()
    folder.config_file.write_text(config, encoding="utf-8")
    html = write_report(folder).read_text(encoding="utf-8")
    checked(html)
    assert "No evaluation was logged" in html and "<img" not in html and "<svg" not in html


def test_the_command_rebuilds_the_report(
    make_run: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run()
    assert main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.report_html)
    assert main(["report", str(folder.path / "nowhere")]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_the_styles_know_dark_and_small_screens(make_run: Callable[..., RunFolder]) -> None:
    html = write_report(make_run()).read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in html and "prefers-reduced-motion" in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert not re.search(r"url\((?!#)|@import|<script", html)
