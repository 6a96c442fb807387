"""Files that others may have made are read here: regular ones alone, none larger than its kind can be, each checked
against a schema.

A run folder, a model, a LoRA or a data set may be a stranger's: what they hold is data with types and bounds. ``files``
is the counterpart that writes. No torch here.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from dreamlora.errors import UserError

logger = logging.getLogger(__name__)

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
_PURE_CHARACTERS = 2**15
"""That the slow parser of YAML is given, which takes a second for each hundred thousand."""
_SHOWN = 160
"""Characters of what was found in a file that a message shows."""
_SURROGATE = re.compile(r"\\(?:u|U0000)[dD][89a-fA-F]")
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
        raise UnreadableError(
            file, f"a link leads out of {inside}. If you trust it, copy the folder with what its links name (cp -rL)"
        )
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


def read_json(file: Path, schema: Schema, inside: Path | None = None, most: int = JSON_BYTES) -> Any:
    """What a .json file of at most ``most`` bytes holds, as ``schema`` has it.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not valid, not what the schema says, or see ``utf8_text``.
    """
    return _checked(file, utf8_text(file, most, inside), json_of, schema)


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


def json_of(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """What JSON text says; a number that is not finite is None.

    Args:
        text: to parse.
        pairs: makes an object of its keys and values; raises a ValueError for those that it does not take.

    Raises:
        ValueError: it is no JSON, or too deeply nested.
    """
    try:
        content = json.loads(text, parse_constant=lambda name: None, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from None
    return _plain(content, legible)


class _UniqueKeys:
    """For loaders of YAML: mappings have every key once, since of two the first would not count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises ValueError if a key is there twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line} has the key {shortened(key.value)[1:-1]} a second time: keep one")
            seen.add(str(key.value))
        return dict(super().construct_mapping(node, deep))  # type: ignore[misc]


class _PureLoader(_UniqueKeys, yaml.SafeLoader):
    """Takes escaped surrogates, as of file names whose bytes are no text, which libyaml does not."""


class _Loader(_UniqueKeys, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Ten times as fast."""


def yaml_of(text: str, finite: bool = True) -> Any:
    """What YAML text says, in the types of JSON; dates are text.

    Args:
        text: to parse.
        finite: whether a number that is not finite is None; else it stays what it is.

    Raises:
        ValueError: it is no YAML, too deeply nested, has a key twice, or holds references or tags.
    """
    loader: Any = _Loader
    if _SURROGATE.search(text):
        loader = _PureLoader
        if len(text) > _PURE_CHARACTERS:
            raise ValueError(
                f"it is too long for one with text that UTF-8 has no bytes for ({_PURE_CHARACTERS} at most)"
            )
    try:
        _refuse_odd_events(yaml.parse(text, loader))
        return _plain(yaml.load(text, loader), str, finite)
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


def _plain(value: Any, text: Callable[[str], str], finite: bool = True, depth: int = 0) -> Any:
    """The value in JSON's types, with what ``text`` makes of texts; raises ValueError."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        return {text(str(key)): _plain(own, text, finite, depth + 1) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(own, text, finite, depth + 1) for own in value]
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    if isinstance(value, int) and abs(value) > _WIDEST:
        raise ValueError(f"it holds a whole number of {value.bit_length()} bits")
    return value if isinstance(value, bool | int | None) else text(str(value))


def legible(text: str) -> str:
    """Text that UTF-8 has bytes for: those of a file name that are no text stand there as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


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
            raise ValueError(_sentence(error.errors(include_url=False)[0])) from None

    def check_line(self, line: bytes) -> Any:
        """The same of a line of JSON, four times as fast as by way of ``json_of``; numbers may not be finite.

        Raises:
            ValueError: it is no JSON, or does not fit.
        """
        try:
            return self._adapter.validate_json(line, strict=True)
        except ValueError:  # pydantic's own is one
            if b"\\ud" not in line.lower():
                raise
            return self.check(json_of(line))  # text that is no UTF-8, as in names of files

    def fitting(self, content: Any) -> tuple[dict[str, Any], list[str]]:
        """The fields of an object that fit, and a sentence for each that does not and is left out.

        Raises:
            ValueError: it is no object, or lacks a field that must be there.
        """
        from pydantic import ValidationError

        if not isinstance(content, dict):
            raise ValueError(f"it holds {shortened(content)} instead of an object")
        try:
            return self._adapter.validate_python(content, strict=True), []
        except ValidationError as error:
            wrong = {str(one["loc"][0]): one for one in reversed(error.errors(include_url=False)) if one["loc"]}
        return self.check({name: own for name, own in content.items() if name not in wrong}), [
            _sentence(one) for one in reversed(wrong.values())
        ]


def _sentence(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors: place, reason, and what was found."""
    place = ".".join(map(str, error["loc"]))
    found = "" if error["type"] == "missing" else f" (got {shortened(error['input'])})"
    return f"{shortened_text(place) + ': ' if place else ''}{error['msg']}{found}"


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return shortened_text(repr(value[:_SHOWN]) if isinstance(value, str | bytes) else repr(value))


def shortened_text(text: str) -> str:
    """The beginning of a text, if it is a long one."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


@functools.cache
def tell_once(text: str) -> None:
    """Warn of something that is read, and found damaged, again and again."""
    logger.warning("%s", text)


def _checked(file: Path, text: str, parse: Callable[[str], Any], schema: Schema) -> Any:
    try:
        return schema.check(parse(text))
    except ValueError as error:
        raise UnreadableError(file, str(error)) from None


def _size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"
