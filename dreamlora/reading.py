"""Files that others may have made are read here: regular ones alone, none larger than its kind can be, each checked
against a schema.

A run folder, a model, a LoRA or a data set may be a stranger's: what they hold is data with types and bounds. ``files``
is the counterpart that writes. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from dreamlora.errors import UserError

JSON_BYTES = 2**26
"""Of a .json file: a comparison of hundreds of runs has some megabytes."""
YAML_BYTES = 2**18
"""Of a .yaml file, which takes seconds per megabyte; that of a run has four kilobytes."""
LINE_BYTES = 2**20
"""Of a line of a .jsonl file."""
LARGEST = 2**53
"""Whole numbers up to this are floating-point numbers too: a bound for counts and steps."""
_WIDEST = 2**64
"""Of any whole number: seeds are drawn from so many."""
_DEEPEST = 32
"""Lists and mappings in one another. Both parsers would end the whole program at some hundred thousand."""
_SHOWN = 160
"""Characters of what was found in a file that a message shows."""
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class UnreadableError(UserError):
    """A file that is there and is not what was expected.

    Attributes:
        reason: as a phrase.
    """

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"cannot read {file}: {reason}")
        self.reason = reason


@contextmanager
def opened(file: Path, inside: Path | None = None) -> Iterator[BinaryIO]:
    """A regular file, open for reading. A pipe or a device, which may never end, is not waited for.

    Args:
        file: to read.
        inside: a folder that the file lies in: no link in it may lead out of it. None: links are followed.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is no regular file, leads out of the folder, or the system refuses.
    """
    if inside is not None and not lies_inside(file, inside):
        raise UnreadableError(file, f"a link leads out of {inside}")
    try:
        descriptor = os.open(file, _FLAGS)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero
        raise UnreadableError(file, getattr(error, "strerror", None) or str(error)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UnreadableError(file, f"it is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, not a file")
    with os.fdopen(descriptor, "rb") as stream:
        yield stream


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is in ``folder`` once all links are followed; the way to the folder itself does not matter."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name with a zero
        return False


def is_regular(file: Path, inside: Path | None = None) -> bool:
    """Whether ``opened`` takes it, as far as its kind and place tell."""
    try:
        return file.is_file() and (inside is None or lies_inside(file, inside))
    except (OSError, ValueError):
        return False


def read_bytes(file: Path, most: int, inside: Path | None = None) -> bytes:
    """All of a file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is larger, or see ``opened``.
    """
    with opened(file, inside) as stream:
        try:
            # no more is asked for than there is: room for as much is made at once. Files that the system makes have 0
            content = stream.read(min(os.fstat(stream.fileno()).st_size or most, most) + 1)
        except OSError as error:
            raise UnreadableError(file, error.strerror or str(error)) from error
    if len(content) > most:
        raise UnreadableError(file, f"it has more than the {_size(most)} that such a file can have")
    return content


def utf8_text(file: Path, most: int, inside: Path | None = None) -> str:
    """The same as UTF-8 text.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is no such text, or see ``read_bytes``.
    """
    try:
        return read_bytes(file, most, inside).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(file, f"it is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(file: Path, schema: Schema, inside: Path | None = None) -> Any:
    """What a .json file holds, as ``schema`` has it.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not valid, not what the schema says, or see ``utf8_text``.
    """
    return _checked(file, utf8_text(file, JSON_BYTES, inside), json_of, schema)


def read_yaml(file: Path, schema: Schema, inside: Path | None = None) -> Any:
    """What a .yaml file holds, as ``schema`` has it; raises as ``read_json``."""
    return _checked(file, utf8_text(file, YAML_BYTES, inside), yaml_of, schema)


def read_lines(file: Path, inside: Path | None = None, most: int = LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers, without ever holding more than one; None for one that is too long.

    Raises:
        FileNotFoundError, UnreadableError: see ``opened``.
    """
    with opened(file, inside) as stream:
        number = 0
        while line := stream.readline(most + 1):
            number += 1
            whole = len(line) <= most
            while len(line) > most and not line.endswith(b"\n"):
                line = stream.readline(most + 1)
            yield number, line if whole else None


def json_of(text: str | bytes) -> Any:
    """What JSON text says; a number that is not finite is None.

    Raises:
        ValueError: it is no JSON, or too deeply nested.
    """
    try:
        content = json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from None
    return _plain(content)


def yaml_of(text: str) -> Any:
    """What YAML text says, in the types of JSON; dates are text.

    Raises:
        ValueError: it is no YAML, too deeply nested, or holds references or tags.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_odd_events(yaml.parse(text, loader))
        return _plain(yaml.load(text, loader))
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"it is not valid YAML: {getattr(error, 'problem', None) or error}{where}") from None
    except (TypeError, AttributeError, OverflowError, RecursionError) as error:  # of odd dates and keys
        raise ValueError(f"it is not valid YAML: {error}") from None


def _refuse_odd_events(events: Iterable[Any]) -> None:
    """References make a small file a huge object, or one that holds itself; tags make objects of other types."""
    depth = 0
    for event in events:
        where: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {where.line + 1} refers to another place of the file (*{event.anchor})")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {where.line + 1} has a tag ({event.tag})")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")


def _plain(value: Any, depth: int = 0) -> Any:
    """The value in JSON's types, finite; raises ValueError."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        return {str(key): _plain(own, depth + 1) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(own, depth + 1) for own in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) > _WIDEST:
        raise ValueError(f"it holds a whole number of {value.bit_length()} bits")
    return value if isinstance(value, bool | int | str | None) else str(value)


class Schema:
    """The types and bounds of what a file holds.

    Args:
        kind: a type as pydantic reads it: a TypedDict (of typing_extensions) or dataclass, with ``annotated_types``'
            bounds. Types are exact ("1" is no number, True neither); unknown fields are left out.
    """

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    @cached_property
    def _adapter(self) -> Any:
        from pydantic import TypeAdapter  # takes a tenth of a second, and --help reads no file

        return TypeAdapter(self._kind)

    def check(self, content: Any) -> Any:
        """The content, as the schema has it.

        Raises:
            ValueError: it does not fit; the text names the first place and what is wrong there.
        """
        from pydantic import ValidationError

        try:
            return self._adapter.validate_python(content, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            found = "" if first["type"] == "missing" else f" (got {shortened(first['input'])})"
            raise ValueError(f"{place + ': ' if place else ''}{first['msg']}{found}") from None


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _checked(file: Path, text: str, parse: Callable[[str], Any], schema: Schema) -> Any:
    try:
        return schema.check(parse(text))
    except ValueError as error:
        raise UnreadableError(file, str(error)) from None


def _size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"
