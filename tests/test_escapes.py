"""Any text stays text in every language that it is written into, and a reader gets it back."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import markdown as python_markdown
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dreamlora import escapes
from dreamlora.files import write_atomically
from dreamlora.reading import yaml_of
from tests.fuzzing import fuzzed

PIECES = st.sampled_from(
    [
        *(
            "\n",
            "\r\n",
            "\u2028",
            "\x85",
            "\0",
            "\x1b[2J",
            "\x9b31m",
            "\u202e",
            "\u200b",
            "\ud800",
            "\ufeff",
            "\t",
            "    ",
        ),
        *("`", "```", "~~~", "<", ">", "</p>", "<script>", "<!--", "-->", "&lt;", "&#60;", "&", '"', "'", "=", "\\"),
        *(
            "# ",
            "- ",
            "+ ",
            "1. ",
            "1) ",
            "> ",
            "| ",
            "---",
            "===",
            "***",
            "*",
            "_",
            "[x](y)",
            "[x]: y",
            "![x](y)",
            "!!!",
        ),
        *(
            "https://evil.example",
            "www.evil.example",
            "<javascript:x>",
            "a@b.cc",
            "{: #x}",
            "$x$",
            "a: b",
            "x #y",
            "!x",
        ),
        *(
            "]]>",
            "<img src=x onerror=y>",
            " onload=x",
            "é",
            "犬",
            "👩\u200d🚀",
            "null",
            "no",
            "1e3",
            "2001-01-01",
            "word",
        ),
    ]
)
TEXTS = st.one_of(
    st.lists(st.one_of(PIECES, st.text(st.characters(), max_size=3)), max_size=8).map("".join),
    st.text(st.characters(), max_size=30),
)
"""With lone surrogates, which come from names of files whose bytes are no text."""
OTHERS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)


class Tags(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", ()))

    def handle_decl(self, decl: str) -> None:
        self.tags.append(("declaration", ()))

    def handle_pi(self, data: str) -> None:
        self.tags.append(("instruction", ()))


def unseen(text: str) -> list[str]:
    """Characters that a reader does not see, and that say what becomes of others."""
    turning = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    unprinted = ("Cc", "Cs", "Zl", "Zp")
    return [
        one
        for one in text
        if one != "\n" and (unicodedata.category(one) in unprinted or unicodedata.bidirectional(one) in turning)
    ]


def test_all_that_is_unseen_is_spelled_out() -> None:
    for number in range(sys.maxunicode + 1):
        one = chr(number)
        shown = escapes.visible(one)
        if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp"):
            assert shown.isascii() and (shown.isprintable() or one == "\n"), hex(number)
        elif unicodedata.category(one) not in ("Cf", "Cn"):
            assert shown == one, f"{number:x} can be seen"
    assert escapes.visible("\x1b[2J\u202e\u200b\ud800") == r"\x1b[2J\u202e\u200b\ud800"
    assert escapes.visible("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم"
    assert escapes.one_line("a\nb") == r"a\nb"


@fuzzed
@given(TEXTS)
def test_fuzz_visible(text: str) -> None:
    assert unseen(escapes.visible(text)) == []
    assert unseen(escapes.one_line(text)) == [] and "\n" not in escapes.one_line(text)
    escapes.visible(text).encode("utf-8")


@fuzzed
@given(TEXTS)
def test_fuzz_message(text: str) -> None:
    """Its further lines cannot be taken for another message."""
    first, *others = escapes.message(text).split("\n")
    assert unseen(first) == [] and all(line[:1] in ("", " ") for line in others)


def test_a_name_forges_no_message() -> None:
    assert escapes.message("no run in x\nERROR: run this") == "no run in x\n    ERROR: run this"
    assert escapes.message("what is\n  indented\n\n  stays") == "what is\n  indented\n\n  stays"


@fuzzed
@given(st.dictionaries(TEXTS, st.one_of(OTHERS, st.lists(OTHERS, max_size=4)), max_size=4), TEXTS)
def test_fuzz_yaml(tmp_path_factory: pytest.TempPathFactory, content: dict[str, object], comment: str) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    write_atomically(file, escapes.yaml_comment(comment) + escapes.yaml_text(content))
    text = file.read_text(encoding="utf-8")
    assert unseen(text) == [] and yaml_of(text) == content
    assert yaml.safe_load(text) == content, "by any other reader"


def test_one_list_in_two_places_is_written_twice() -> None:
    shared = ["a", "b"]
    assert yaml_of(escapes.yaml_text({"x": shared, "y": shared})) == {"x": shared, "y": shared}


@fuzzed
@given(TEXTS)
def test_fuzz_html(text: str) -> None:
    for page in (
        f'<p title="{escapes.html(text)}">{escapes.html(text)}</p>',
        f"<p title='{escapes.html(text)}'>{escapes.html(text)}</p>",
        f'<p title="{escapes.html(text)}">{escapes.html_around(text, "(--)", "<b>")}</p>'.replace("<b>", "--"),
    ):
        found = Tags(page)
        assert found.tags == [("p", ("title",))] and found.values == [escapes.visible(text)]
        assert found.text == escapes.visible(text)


@fuzzed
@given(st.one_of(OTHERS, st.lists(OTHERS), st.dictionaries(TEXTS, OTHERS)))
def test_fuzz_script_json(content: object) -> None:
    page = f"<script>{escapes.script_json(content)}</script><p>"
    found = Tags(page)
    assert [tag for tag, _ in found.tags] == ["script", "p"]
    assert json.loads(found.text) == content
    page.encode("utf-8")


def test_json_in_a_page_has_no_way_out() -> None:
    assert escapes.script_json({"a": "</script>"}) == '{"a":"\\u003c/script>"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        escapes.script_json(float("nan"))


@fuzzed
@given(TEXTS)
def test_fuzz_addresses(text: str) -> None:
    base = "file:///run/report.html"
    link = escapes.inner_link(text)
    if link is not None:
        assert re.fullmatch(r"[\w.~%/-]+", link, re.ASCII)
        assert urljoin(base, link).startswith("file:///run/") and not urlsplit(link).scheme
        assert escapes.path_of_url(link) == str(escapes.inner_path(text))
    if not re.search("[\ud800-\udc7f\udd00-\udfff]", text):  # no name of a file
        assert escapes.path_of_url(escapes.url_path(text)) == text


@pytest.mark.parametrize(
    ("path", "link"),
    [
        ("runs/a/report.html", "runs/a/report.html"),
        ("runs/50% #1?.html", "runs/50%25%20%231%3F.html"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
        ("data:text/html,x", "data%3Atext/html%2Cx"),
        *((path, None) for path in ("//evil.example/x", "/etc/passwd", "../other/report.html", "a/../../b", "")),
        *((path, None) for path in ("\\\\evil\\x", "a\\b", "a\nb", "a\x1bb", "\ud800", ".", 7, None, ["a"])),
    ],
)
def test_links_stay_in_the_folder(path: object, link: str | None) -> None:
    assert escapes.inner_link(path) == link


TEMPLATE = (
    "# {0}\n\n**{0}** and\n{0}\n\n{0}\n\n> ⚠ {0}\n\n| a | b |\n|---|---|\n| {0} | {0} |\n\n- {0}\n\n![{0}](plot.svg)\n"
)
READERS = {
    "CommonMark with tables and bare links": MarkdownIt("gfm-like", {"linkify": False}).render,
    "CommonMark": MarkdownIt("commonmark").render,
    "Python-Markdown": lambda text: python_markdown.markdown(text, extensions=["tables", "fenced_code", "attr_list"]),
    "Python-Markdown, bare": python_markdown.markdown,
}


@pytest.mark.parametrize("reader", READERS)
@fuzzed
@given(TEXTS)
def test_fuzz_markdown(reader: str, text: str) -> None:
    """Wherever a template puts it, there are the tags that a word makes, and its letters."""
    written = escapes.markdown(text) or "x"
    found, usual = (Tags(READERS[reader](TEMPLATE.replace("{0}", inner))) for inner in (written, "word"))
    assert found.tags == usual.tags, written
    shown = " ".join(escapes.one_line(" ".join(text.split())).split()) or "x"
    assert " ".join(found.text.split()) == " ".join(usual.text.replace("word", shown).split()), written
    assert all(value.count("plot.svg") or value == shown or ":" not in value for value in found.values)


@pytest.mark.parametrize("reader", READERS)
@fuzzed
@given(TEXTS)
def test_fuzz_markdown_code(reader: str, text: str) -> None:
    page = f"before\n\n{escapes.markdown_code(f'$ {text}')}\n\nafter\n"
    found = Tags(READERS[reader](page))
    assert found.tags == [("p", ()), ("pre", ()), ("code", ()), ("p", ())]
    assert found.text.split() == ["before", *f"$ {escapes.visible(text)}".split(), "after"]


def test_addresses_in_markdown_are_no_links() -> None:
    """GitHub makes links of bare ones, by what stands before and behind these signs."""
    shown = escapes.markdown("see https://evil.example, ftp://x, www.evil.example, WWW.x and me@evil.example")
    assert not re.search(r"://|www\.|@", shown, re.IGNORECASE)


def test_text_stays_readable_in_markdown() -> None:
    assert escapes.markdown("scaled_adamw: loss −3.6\u202f% [−4.0, −3.2], 5 of 5.") == (
        r"scaled\_adamw: loss −3.6 % \[−4.0, −3.2\], 5 of 5."
    )


BORDERS = {"dreamlora/escapes.py"}


def test_nobody_else_escapes() -> None:
    """Templates are escaped as a whole; what is markup already is called so by one function."""
    forbidden = re.compile(
        r"\bhtml\.escape|\bmarkupsafe\b|\bMarkup\(|\| *safe\b|unicode_escape|urllib\.parse import.*\bquote\b|saxutils"
        r"|yaml\.(safe_)?dump|autoescape *=? *(False|false)"
    )
    package = Path(escapes.__file__).parent
    found = {
        f"{file.relative_to(package.parent)}: {match[0]}"
        for file in package.rglob("*")
        if file.suffix in (".py", ".j2", ".js") and str(file.relative_to(package.parent)) not in BORDERS
        for match in forbidden.finditer(file.read_text(encoding="utf-8"))
    }
    assert found == set()
