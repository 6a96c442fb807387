"""The options of a run as its config.yaml holds them, each checked as if it were given on a command line."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from dreamlora.cli.declared import Option, options_of, subgroups_of
from dreamlora.cli.given import entries_of, value_of
from dreamlora.config import RunConfig, program_of
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
    declared = _declared(program)
    kept: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in content.items():
        try:
            if name in declared:
                kept[name] = _checked(*declared[name], value, program)
            elif _plain(value):
                kept[name] = value
            else:
                raise UserError(f"unknown option {name!r:.80}")
        except UserError as error:
            wrong.append(shortened_text(str(error).removeprefix(f"{_WHERE}: ")))
    return kept, wrong


@functools.cache
def _declared(program: type[RunConfig]) -> dict[str, tuple[Option, type]]:
    """Every option with the group that it belongs to; finding them takes a hundred times as long as checking them."""
    groups = subgroups_of(program).values()
    offered = options_of(program)
    return {name: (offered[name], group) for group in groups for name in options_of(group) if name in offered}


def _checked(option: Option, group: type, value: Any, program: type[RunConfig]) -> Any:
    if value is None:
        return None
    read: Any = entries_of(option, value, _WHERE, program) if option.entries else value_of(option, value, _WHERE)
    return as_yaml(getattr(group(**{option.name: read}), option.name))  # the group checks the range


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(not isinstance(one, list) and _plain(one) for one in value)
    return not isinstance(value, dict) and (not isinstance(value, str) or len(value) <= _LONGEST)
