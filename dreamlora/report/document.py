"""What every report is: files made from other files, with a page at the centre."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlora import __version__
from dreamlora.files import write_atomically

PAGE = "report.html"
TEXT = "report.md"


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
    """A template of this package with its blanks filled; what goes into HTML is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dreamlora.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = markdown
    environment.filters["flags"] = _flags
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(content, program=f"dreamlora {__version__}")


def markdown(value: Any) -> str:
    """Text that Markdown leaves as it is, also in a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(str(value).split()))


def _flags(text: str) -> str:
    """Escaped text in which no flag is broken after its dashes."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(--\w+)", r'<code class="flag">\1</code>', str(escape(text))))


def _breakable(text: str) -> str:
    """Escaped text that may be broken where a name such as "scaled_adamw:variant=split" has a joint."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([:+/])", r"\1<wbr>", str(escape(text))))
