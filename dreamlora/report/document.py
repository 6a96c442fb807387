"""What every report is: files made from other files, with a page at the centre."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamlora import __version__
from dreamlora.escapes import Markup, html, html_around, markdown, markdown_code, markup, url_path
from dreamlora.files import write_atomically

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = "report.html"
TEXT = "report.md"
_SCRIPTS = ("comparison.js", "live.js")


@dataclass(frozen=True)
class Document:
    """The report of one folder.

    Attributes:
        folder: where it lies, and what the page's links are relative to.
        sources: the files it is made from; when one of them changes, the report is out of date.
        beside: names in the folder that the page may link to.
        render: text of every file of the report by its name in the folder, ``report.html`` among them. Raises
            ``UserError`` where the sources cannot be read.
    """

    folder: Path
    sources: tuple[Path, ...]
    beside: tuple[str, ...]
    render: Callable[[], Mapping[str, str]]

    def write(self) -> Path:
        """Write all files; the path of the page.

        Raises:
            UserError: the sources cannot be read.
        """
        for name, text in self.render().items():
            write_atomically(self.folder / name, text)
        return self.folder / PAGE


def filled(template: str, content: Mapping[str, Any]) -> str:
    """A template of this package with its blanks filled: by text that is escaped as the kind of file needs it."""
    environment = _environment(html if ".html" in template else markdown)
    more = {"program": f"dreamlora {__version__}", "scripts": _scripts(), "policy": policy()}
    return environment.get_template(template).render({**content, **more})


def policy() -> str:
    """What a page may do, as browsers take it: show what lies in it, and run our scripts; nothing from elsewhere."""
    hashes = (hashlib.sha256(script.encode()).digest() for script in _scripts().values())
    known = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {known}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _scripts() -> dict[str, Markup]:
    place = files(__package__) / "templates"
    return {name: markup((place / name).read_text(encoding="utf-8")) for name in _SCRIPTS}


@functools.cache
def _environment(escape: Callable[[Any], str]) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dreamlora.report"),
        autoescape=True,  # of what is not escaped below: nothing
        finalize=lambda value: value if isinstance(value, Markup) else markup(escape(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["address"] = lambda path: markup(url_path(path))
    environment.filters["code"] = markdown_code
    environment.filters["flags"] = _flags
    environment.filters["breakable"] = _breakable
    return environment


def _flags(text: str) -> Markup:
    """Text in which no flag is broken after its dashes."""
    return html_around(text, r"(--\w+)", r'<code class="flag">\1</code>')


def _breakable(text: str) -> Markup:
    """Text that may be broken where a name such as "scaled_adamw:variant=split" has a joint."""
    return html_around(text, r"([:/]|[+,](?=[A-Za-z]))", r"\1<wbr>")
