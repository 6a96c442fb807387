"""The text that ``dreamlora resize`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.commands.kept_layers import table_of
from dreamlora.commands.lora_files import megabytes
from dreamlora.escapes import one_line


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines, from ``resize.resize``."""
    yield from map(one_line, table_of(found))
    sizes = f"{megabytes(found['bytes_before'])} -> {megabytes(found['bytes'])}"
    yield one_line(f"{found['output']}: {sizes}, format {found['format']}")
