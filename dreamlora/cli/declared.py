"""The options that a dataclass declares, as command lines and help texts need to know them."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NOUNS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "INT"),
    float: ("a number", "FLOAT"),
    str: ("a text", "TEXT"),
    Path: ("a path", "PATH"),
    bool: ("true or false", ""),
}


@dataclass(frozen=True)
class Option:
    """One flag.

    Attributes:
        annotation: the field's type as declared.
        kind: the type of one value: int, float, str, Path or bool.
        choices: the allowed words, or empty for any.
        several: whether it takes a list of values.
        count: how many values exactly; 0 for any number.
        default: ``dataclasses.MISSING`` if it must be given.
        help: the docstring under the field.
    """

    name: str
    annotation: Any
    kind: Any
    choices: tuple[str, ...]
    several: bool
    count: int
    default: Any
    help: str

    @property
    def switch(self) -> bool:
        """Whether it is on or off and takes no value."""
        return self.kind is bool

    @property
    def takes(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        noun = _NOUNS.get(self.kind, ("a value", ""))[0]
        return f"{self.count or 'any number of'} values, each {noun}" if self.several else noun

    @property
    def metavar(self) -> str:
        """What it takes, for the help text."""
        one = f"{{{','.join(self.choices)}}}" if self.choices else _NOUNS.get(self.kind, ("", "VALUE"))[1]
        return " ".join([one] * self.count) if self.count else f"{one} ..." if self.several else one

    @property
    def shown_default(self) -> str:
        """The default as one would type it."""
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        return ("off", "on")[self.default] if isinstance(self.default, bool) else str(self.default)

    def accepts(self, word: str) -> bool:
        """Whether a word has the right form for one value (ranges are checked by the dataclass)."""
        if self.choices:
            return self.respelled(word) in self.choices
        if self.kind not in (int, float):
            return True
        try:
            self.kind(word)
        except ValueError:
            return False
        return True

    def respelled(self, word: str) -> str:
        """A choice in its own spelling: case does not matter."""
        return next((choice for choice in self.choices if choice.lower() == word.lower()), word)


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

    A class may have a mapping ``NOT_OFFERED``: options of these names are left out.

    Raises:
        TypeError: two groups declare the same name.
    """
    hints, groups = get_type_hints(config_class), subgroups_of(config_class)
    texts = _texts(config_class)
    options: dict[str, Option] = {}
    for declared in fields(config_class):
        if declared.name not in groups:
            found = {declared.name: _option(declared, hints[declared.name], texts.get(declared.name, ""))}
        else:
            found = options_of(groups[declared.name]) if deep else {}
        if options.keys() & found.keys():
            raise TypeError(f"{config_class.__name__} declares {options.keys() & found.keys()} twice")
        options |= found
    hidden: Mapping[str, str] = getattr(config_class, "NOT_OFFERED", {})
    return {name: option for name, option in options.items() if name not in hidden}


def _option(declared: Field[Any], annotation: Any, text: str) -> Option:
    default = declared.default
    if default is MISSING and declared.default_factory is not MISSING:
        default = declared.default_factory()
    inner = _without_none(annotation)
    several = get_origin(inner) in (tuple, list)
    arguments = get_args(inner) if several else ()
    count = len(arguments) if several and get_origin(inner) is tuple and Ellipsis not in arguments else 0
    one = arguments[0] if several else inner
    choices = tuple(map(str, get_args(one))) if get_origin(one) is Literal else ()
    return Option(declared.name, annotation, str if choices else one, choices, several, count, default, text)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


@functools.cache
def _docstrings(file: str) -> dict[str, dict[str, str]]:
    """The string under each field, by class; Python throws them away, so they are read from the source."""
    classes = (node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.ClassDef))
    return {node.name: dict(_described(node)) for node in classes}


def _described(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, below in itertools.pairwise(node.body):
        text = below.value if isinstance(below, ast.Expr) else None
        if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Constant) and isinstance(text.value, str):
            yield ast.unparse(statement.target), " ".join(text.value.split())
