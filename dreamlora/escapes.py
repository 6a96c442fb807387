"""Text that others may have written stays text: escaped where it goes into a language, by one function for each.

In all of them characters that cannot be seen, or that make others be seen elsewhere, are spelled out (``\\x1b``), so
that a page, a file or a terminal shows what a text holds. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

import yaml
from markupsafe import Markup, escape

_UNSEEN = re.compile(
    "["
    "\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f"  # control characters but for the line break
    "\\xad\u061c\u180e\u200b\u200e\u200f"  # soft hyphen, zero-width space, marks of direction
    "\u2028-\u202e\u2060-\u206f"  # separators of lines, embeddings and isolates of direction, invisible operators
    "\ud800-\udfff\ufeff\ufff9-\ufffb"  # bytes that are no text, byte order mark, annotations
    "\U000e0000-\U000e007f"  # tags
    "]"
)
"""Joiners (U+200C, U+200D) are not among them: several scripts, and emoji, are wrong without."""
_LINE_BREAK = "\n"
_FURTHER = "    "
"""Before the further lines of a message: only what begins at the left is the program's own."""


def visible(text: str) -> str:
    """``text`` with what cannot be seen spelled out, but for line breaks: what a terminal shows as it is."""
    return _UNSEEN.sub(_spelled, text)


def one_line(text: str) -> str:
    """The same with its line breaks spelled out too: a name, in a table or a comment."""
    return visible(text).replace(_LINE_BREAK, "\\n")


def message(text: str) -> str:
    """A message for a terminal: a line, and further ones behind an indent, so that a name cannot forge another one."""
    first, *others = visible(text).split(_LINE_BREAK)
    return _LINE_BREAK.join([first, *(line if line[:1] in ("", " ") else _FURTHER + line for line in others)])


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


# YAML


class _Dumper(yaml.SafeDumper):
    """Writes so that every reader of YAML reads the same text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always: a list that is there twice is written twice; references are refused where files are read."""
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text with characters that readers take for line breaks, or do not take at all, goes between double quotes."""
    style = '"' if _UNSEEN.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def yaml_text(content: Mapping[str, Any]) -> str:
    """A mapping as YAML, a line for each entry; ``reading.yaml_of`` reads the same.

    Args:
        content: of JSON's types.
    """
    # what is still unseen stands between double quotes, where YAML spells it as Python does
    return visible(yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31))


def yaml_comment(text: str) -> str:
    """A comment, with its line break."""
    return f"# {one_line(text)}\n"


# HTML and what lies in it


def html(text: Any) -> Markup:
    """Text for an element or a quoted attribute."""
    return escape(visible(str(text)))


def html_around(text: Any, pattern: str, markup: str) -> Markup:
    r"""The same with ``markup`` of our own around what matches, such as ``<b>\1</b>``.

    Args:
        pattern: of letters, digits and signs that HTML has no other way to write.
    """
    return Markup(re.sub(pattern, markup, str(html(text))))


def markup(text: str) -> Markup:
    """What is HTML or Markdown already, made of escaped parts by this program."""
    return Markup(text)


def script_json(content: Any) -> Markup:
    """JSON that may stand inside a script element: without "<", no text can end the element or begin a comment.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


# Addresses


def url_path(path: str) -> str:
    """A path as an address has it, relative or from a server's root: no character in it begins anything else."""
    return quote(path, errors="surrogateescape")


def path_of_url(address: str) -> str:
    """The path that ``url_path`` made an address of."""
    return unquote(address, errors="surrogateescape")


def inner_path(path: Any) -> PurePosixPath | None:
    """A path to a file beside a page, or in folders there; None for what is none."""
    if not isinstance(path, str) or "\\" in path or path != one_line(path):
        return None
    inner = PurePosixPath(path)
    return None if ".." in inner.parts or inner.is_absolute() or not inner.parts else inner


def inner_link(path: Any) -> str | None:
    """The address of such a file, relative to the page: it has no scheme and no host, whatever the path."""
    inner = inner_path(path)
    return None if inner is None else url_path(str(inner))


# Markdown

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_IN_MARKDOWN = re.compile(
    r"(?P<slash>[\\`*_{}\[\]#]|^[-+](?=\s|$)|^-(?=-)|^!)"
    r"|(?P<entity>[&<>~$@|]|^[=:]|:(?=//)|(?<=www)\.)",
    re.IGNORECASE,
)
"""What may begin something: a list or a heading at the beginning, an address without brackets, and so on. Not every
reader knows a backslash before the signs of the second line."""
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")


def markdown(text: Any) -> str:
    """Text that Markdown leaves as it is: on a line, in a table, in the description of a picture."""
    flat = " ".join(one_line(" ".join(str(text).split())).split())
    return _NUMBERED.sub(r"\1\\\2", _IN_MARKDOWN.sub(_in_markdown, flat))


def _in_markdown(found: re.Match[str]) -> str:
    one = found[0]
    return f"\\{one}" if found["slash"] else _ENTITIES.get(one, f"&#{ord(one)};")


def markdown_code(text: Any) -> Markup:
    """Lines of code for Markdown, behind an indent, which nothing in them can end. Not behind a list."""
    return Markup(_LINE_BREAK.join(f"    {line}" for line in visible(str(text)).split(_LINE_BREAK)))
