"""The options of a run as its config.yaml holds them, each checked as if it were given on a command line."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

from dreamlora.cli.declared import Option, options_of, subgroups_of
from dreamlora.cli.given import entries_of, value_of
from dreamlora.config import PROGRAMS, RunConfig, program_of
from dreamlora.config.run import as_yaml
from dreamlora.errors import UserError
from dreamlora.reading import shortened_text

_LONGEST = 2**16
"""Characters of the text of an option that is not known here."""
_WHERE = "config.yaml"


def saved_options(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options that fit, in the types of YAML, and a sentence for each that does not and is left out.

    An option of another version, which is not known here, is kept if it is a plain value or a list of such.

    Args:
        content: of config.yaml.
    """
    program = program_of(content)
    declared = _declared(program.COMMAND)
    sound = _sound_groups(content, declared, program)
    kept: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in content.items():
        try:
            if name in declared:
                group = sound.get(declared[name]) or _group(declared[name], {name: value}, program)
                kept[name] = None if value is None else as_yaml(getattr(group, name))
            elif _plain(value):
                kept[name] = value
            else:
                raise UserError(f"unknown option {name!r:.80}")
        except UserError as error:
            wrong.append(shortened_text(str(error).removeprefix(f"{_WHERE}: ")))
    return kept, wrong


def _sound_groups(
    content: Mapping[str, Any], declared: Mapping[str, type], program: type[RunConfig]
) -> dict[type, Any]:
    """The groups all of whose options fit, together: some, such as bucket_step, go with others only."""
    sound = {}
    for kind in set(declared.values()):
        with contextlib.suppress(UserError):
            values = {name: value for name, value in content.items() if declared.get(name) is kind}
            sound[kind] = _group(kind, values, program)
    return sound


def saved_group(options: Mapping[str, Any], kind: Any) -> Any:
    """A group of options, such as ``Data``, as ``saved_options`` gave them.

    Raises:
        UserError: they do not go together.
    """
    program = program_of(options)
    return _group(kind, {name: options.get(name) for name in options_of(kind)}, program)


@functools.cache
def _declared(command: str) -> dict[str, type]:
    """The group of every option; finding them takes a hundred times as long as checking them."""
    groups = subgroups_of(PROGRAMS[command]).values()
    offered = options_of(PROGRAMS[command])
    return {name: group for group in groups for name in options_of(group) if name in offered}


def _group(kind: Any, values: Mapping[str, Any], program: type[RunConfig]) -> Any:
    """The group, which checks the ranges; values that are None stay at their default."""
    given = {name: value for name, value in values.items() if value is not None}
    return kind(**{name: _read(_options(kind)[name], value, program) for name, value in given.items()})


def _read(option: Option, value: Any, program: type[RunConfig]) -> Any:
    return entries_of(option, value, _WHERE, program) if option.entries else value_of(option, value, _WHERE)


_options = functools.cache(options_of)


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(not isinstance(one, list) and _plain(one) for one in value)
    return not isinstance(value, dict) and (not isinstance(value, str) or len(value) <= _LONGEST)
