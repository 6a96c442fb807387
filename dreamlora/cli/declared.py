"""The options that a dataclass declares, as command lines and help texts need to know them."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from dreamlora.config.ranges import MOST_CHARACTERS
from dreamlora.credentials import is_secret
from dreamlora.reading import shortened


class _Kind(NamedTuple):
    """What one value can be: in words, in the help text, and how a word becomes one (ValueError: it does not)."""

    noun: str
    metavar: str
    read: Callable[[str], Any]


def _path(word: str) -> Path:
    if not word:  # a shell variable that is not set; Path would make it the current folder
        raise ValueError("empty")
    return expanded(word)


def expanded(word: str) -> Path:
    """The path; ``~`` is the home folder, which no shell puts in behind ``--flag=``, nor into a YAML file.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(word).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _text(word: str) -> str:
    return str(expanded(word)) if word.startswith("~/") else word  # a folder, where names of the hub are taken too


def _truth(word: str) -> bool:
    return ("false", "true").index(word.lower()) == 1


_KINDS: dict[Any, _Kind] = {
    int: _Kind("a whole number", "INT", int),
    float: _Kind("a number", "FLOAT", float),
    str: _Kind("a text", "TEXT", _text),
    Path: _Kind("a path", "PATH", _path),
    bool: _Kind("true or false", "", _truth),
}
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Option:
    """One flag.

    Attributes:
        kind: the type of one value: int, float, str, Path or bool; or a dataclass, for a list of entries that only
            a YAML file can hold.
        choices: the allowed words, or empty for any; of a number, words that stand beside it.
        several: whether it takes a list of values.
        count: how many values exactly; 0 for any number.
        default: ``dataclasses.MISSING`` if it must be given.
        help: the docstring under the field.
    """

    name: str
    kind: Any
    choices: tuple[str, ...]
    several: bool
    count: int
    default: Any
    help: str

    @property
    def switch(self) -> bool:
        """Whether it is on or off and takes no value."""
        return self.kind is bool and not self.several

    @property
    def entries(self) -> bool:
        """Whether its values are mappings, with the fields of ``kind``."""
        return is_dataclass(self.kind)

    @property
    def takes(self) -> str:
        """What it takes, in words."""
        if self.entries:
            return "a list of entries, each with keys and values, in a --config file"
        if self.choices and self.kind is str:
            return f"one of {', '.join(self.choices)}"
        noun = " or ".join([_KINDS[self.kind].noun, *self.choices])
        return f"{self.count or 'any number of'} values, each {noun}" if self.several else noun

    @property
    def metavar(self) -> str:
        """What it takes, for the help text."""
        if self.entries:
            return "(in a --config file)"
        words = [] if self.choices and self.kind is str else [_KINDS[self.kind].metavar]
        one = f"{{{','.join([*words, *self.choices])}}}" if self.choices else words[0]
        return " ".join([one] * self.count) if self.count else f"{one} ..." if self.several else one

    @property
    def default_text(self) -> str:
        """The default as one would type it."""
        if isinstance(self.default, tuple):
            return ("," if self.count else " ").join(map(str, self.default))
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return ("off", "on")[self.default] if isinstance(self.default, bool) else str(self.default)

    def read(self, words: Sequence[str]) -> Any:
        """The value that words stand for: one, or a tuple. Ranges are for the dataclass to check.

        A fixed number of values may also be one word, with commas between them.

        Raises:
            ValueError: the words have not the right number or form; the message goes on after the option's name.
        """
        if self.entries:
            raise ValueError(f"takes {self.takes}")
        if self.count and len(words) == 1:
            words = words[0].split(",")
        if self.count and len(words) != self.count:
            raise ValueError(f"takes {self.count} values (got {len(words)}{self._shown(words)})")
        if self.several:
            return tuple(self._one(word) for word in words)
        if not words:
            hint = "; if it begins with a dash, put = before it" if self.kind is str and not self.choices else ""
            raise ValueError(f"needs a value: {self.takes}{hint}")
        if len(words) > 1:
            got = f"got {len(words)}{self._shown(words)}"
            raise ValueError(f"takes one value ({got}); put quotes round a text with spaces")
        return self._one(words[0])

    def _shown(self, words: Sequence[str]) -> str:
        """What was given, as messages show it."""
        return "" if is_secret(self.name) else f": {_first(words)}"

    def _one(self, word: str) -> Any:
        if len(word) > MOST_CHARACTERS:
            raise ValueError(f"takes {self.takes} of at most {MOST_CHARACTERS:,} characters (got {len(word):,})")
        try:
            lowered = [choice.lower() for choice in self.choices]  # case does not matter
            if word.lower() in lowered or (self.choices and self.kind is str):
                return self.choices[lowered.index(word.lower())]
            value = _KINDS[self.kind].read(word)
        except ValueError:
            near = get_close_matches(word.lower(), self.choices, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"takes {self.takes} (got {shortened(word)}){hint}") from None
        if self.kind is int and abs(value) > _LARGEST:  # torch takes none, and no file has it read again
            raise ValueError(f"takes {self.takes} up to {_LARGEST} (got one of {len(word)} digits)")
        return value


def _first(words: Sequence[str]) -> str:
    """Words as a message shows them."""
    return shortened(" ".join(words[:20]))[1:-1]


def subgroups_of(config_class: type[Any]) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves."""
    hints = get_type_hints(config_class)
    return {f.name: _group(f, hints[f.name]) for f in fields(config_class) if is_dataclass(hints[f.name])}


def _group(declared: Field[Any], annotation: Any) -> type:
    """The class of a group: that of its default, which may be more special than the annotation."""
    factory = declared.default_factory
    return factory if isinstance(factory, type) and issubclass(factory, annotation) else annotation


def _texts(config_class: type[Any]) -> dict[str, str]:
    """Help by field, those of base classes included."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in config_class.__mro__ if is_dataclass(base)]):
        texts |= _docstrings(inspect.getfile(base)).get(base.__name__, {})
    return texts


def options_of(config_class: type[Any], deep: bool = True) -> dict[str, Option]:
    """Every option by name, in the order of declaration; with ``deep`` those of its groups too.

    A class may have a mapping ``NOT_OFFERED``: options of these names are left out. A field with the metadata
    ``{"option": False}`` is none.

    Raises:
        TypeError: two groups declare the same name, or a field has a type that no word can stand for.
    """
    hints, groups = get_type_hints(config_class), subgroups_of(config_class)
    texts = _texts(config_class)
    options: dict[str, Option] = {}
    for declared in (declared for declared in fields(config_class) if declared.metadata.get("option", True)):
        if declared.name not in groups:
            more = {declared.name: _option(declared, hints[declared.name], texts.get(declared.name, ""))}
        else:
            more = options_of(groups[declared.name]) if deep else {}
        if options.keys() & more.keys():
            raise TypeError(f"{config_class.__name__} declares {options.keys() & more.keys()} twice")
        options |= more
    not_offered: Mapping[str, str] = getattr(config_class, "NOT_OFFERED", {})
    return {name: option for name, option in options.items() if name not in not_offered}


def _option(declared: Field[Any], annotation: Any, text: str) -> Option:
    default = declared.default
    if default is MISSING and declared.default_factory is not MISSING:
        default = declared.default_factory()
    inner = _without_none(annotation)
    several = get_origin(inner) is tuple
    parts = get_args(inner) if several else (inner,)
    one = parts[0] if parts else None
    number, words = _number_or_words(one)
    choices = get_args(words)
    kind = number or (str if choices else one)
    known = (kind in _KINDS or is_dataclass(kind)) and all(isinstance(choice, str) for choice in choices)
    if not known or any(part not in (one, Ellipsis) for part in parts):
        raise TypeError(f"{declared.name}: no word of a command line can become a {annotation}")
    count = len(parts) if several and Ellipsis not in parts else 0
    return Option(declared.name, kind, choices, several, count, default, text)


def _without_none(annotation: Any) -> Any:
    """``X`` of ``X | None``."""
    own = tuple(part for part in _alternatives(annotation) if part is not type(None))
    return Union[own]  # noqa: UP007 - of one alone it is that one


def _number_or_words(annotation: Any) -> tuple[Any, Any]:
    """``float`` and ``Literal[...]`` of ``float | Literal[...]``; None for what it has not."""
    parts = _alternatives(annotation)
    words = next((part for part in parts if get_origin(part) is Literal), None)
    number = next((part for part in parts if part in (int, float)), None)
    return (number, words) if {number, words} == {*parts} or words is annotation else (None, None)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


@functools.cache
def _docstrings(file: str) -> dict[str, dict[str, str]]:
    """The string under each field, by class; Python throws them away, so they are read from the source."""
    classes = (
        node for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)
    )
    return {node.name: dict(_described(node)) for node in classes}


def _described(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, below in itertools.pairwise(node.body):
        text = below.value if isinstance(below, ast.Expr) else None
        if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Constant) and isinstance(text.value, str):
            yield ast.unparse(statement.target), " ".join(text.value.split())
