"""What is given for the options of a program, by its command line or by a YAML file, as values of the right types.

A mistake is one message that names the flag, or the file and its key.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlora.cli.declared import Option, expanded, options_of, subgroups_of
from dreamlora.cli.foreign import ELSEWHERE, UNNEEDED
from dreamlora.cli.help import filled
from dreamlora.errors import UserError
from dreamlora.reading import YAML_BYTES, UnreadableError, shortened, utf8_text, yaml_of

_FLAG = re.compile(r"--?[A-Za-z]")


def flag_in(word: str) -> str | None:
    """The option that a word such as ``--lora-layers`` or ``--rank=8`` names; None for a value, such as -1."""
    return word.partition("=")[0].lstrip("-").replace("-", "_") if _FLAG.match(word) else None


def divided(argv: Sequence[str], own: Collection[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are for a program's own options, and those for another's beside them.

    Args:
        own: names of options.
    """
    mine: list[str] = []
    others: list[str] = []
    taker = mine
    for word in argv:
        name = flag_in(word)
        if name is not None:
            is_own = name in own or name.removeprefix("no_") in own or word in ("-h", "--help")
            taker = mine if is_own else others
        taker.append(word)
    return mine, others


def from_argv(
    argv: Sequence[str], config_class: type, program: str, positional: str | None
) -> tuple[dict[str, Any], list[Path]]:
    """What a command line gives, by option, and the files of --config.

    Args:
        program: the command, as in messages.
        positional: the option that words before the first flag belong to.

    Raises:
        UserError: an unknown flag, or a value that does not fit.
    """
    options = options_of(config_class)
    given: dict[str, Any] = {}
    files: list[Path] = []
    for name, words in _split(argv, program, options, positional):
        if name == "config":
            if len(words) != 1:
                raise UserError(f"--config takes one YAML file (got {len(words)} words)")
            files.append(_file(words[0]))
        elif name in options:
            given[name] = _switched_on(name, words) if options[name].switch else value_of(options[name], words)
        elif name.removeprefix("no_") in options and options[name.removeprefix("no_")].switch:
            if words:
                raise UserError(f"--{name} takes no value (got {shortened(' '.join(words))})")
            given[name.removeprefix("no_")] = False
        elif not _unneeded(name, options):
            unknown = _unknown(f"flag --{name}", name, options, config_class)
            raise UserError(unknown + f"\nAll flags: {program} --help")
    return given, files


def _file(word: str) -> Path:
    try:
        return expanded(word)
    except ValueError as error:
        raise UserError(f"--config {word}: {error}") from None


def from_yaml(file: Path, config_class: type) -> dict[str, Any]:
    """The entries of a --config file, whether in groups or flat, by option; None where it says null.

    Raises:
        UserError: it cannot be read, has an unknown key, or a value that does not fit.
    """
    options = options_of(config_class)
    try:
        entries = yaml_of(utf8_text(file, YAML_BYTES), finite=False)
    except FileNotFoundError as error:
        raise UserError(f"--config: cannot read {file}: {error.strerror}") from None
    except UnreadableError as error:
        raise UserError(f"--config: {error}") from None
    except ValueError as error:
        raise UserError(f"--config: {file}: {error}") from None
    if not isinstance(entries, dict | None):
        raise UserError(f"--config: {file} must hold entries such as `rank: 8` (got a {type(entries).__name__})")
    given: dict[str, Any] = {}
    for name, value in _flat(entries or {}, config_class, file).items():
        if name in options and options[name].entries:
            given[name] = entries_of(options[name], value, str(file), config_class)
        elif name in options:
            given[name] = value_of(options[name], value, str(file))
        elif not _unneeded(name, options) and value is not None:
            raise UserError(_unknown(f"key {shortened(name)} in {file}", name, options, config_class))
    return given


def _flat(entries: Mapping[Any, Any], config_class: type, file: Path) -> dict[str, Any]:
    """Entries without their groups, by option; each is there once."""
    flat: dict[str, Any] = {}
    for key, value in entries.items():
        inside = key in subgroups_of(config_class) and isinstance(value, dict | None)
        for spelled, own in ((value or {}) if inside else {key: value}).items():
            name = str(spelled).replace("-", "_")
            if name in flat:
                raise UserError(f"--config: {file} has {name} twice: keep one")
            flat[name] = own
    return flat


def entries_of(option: Option, given: Any, file: str, config_class: type) -> tuple[Any, ...] | None:
    """A list of mappings as records of the option's dataclass; without what the program does not offer."""
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise UserError(f"{file}: {option.name} takes {option.takes} (got {shortened(given)})")
    not_offered: Mapping[str, str] = getattr(config_class, "NOT_OFFERED", {})
    offered = {name: own for name, own in options_of(option.kind).items() if name not in not_offered}
    records = []
    for number, entry in enumerate(given, start=1):
        where = f"{file}, entry {number} of {option.name}"
        values: dict[str, Any] = {}
        for key, value in entry.items():
            name = str(key).replace("-", "_")
            if name in values:
                raise UserError(f"{where} has {name} twice: keep one")
            if name not in offered:
                why = f"not offered: {not_offered[name]}" if name in not_offered else "unknown"
                raise UserError(f"{where}: {shortened(key)} is {why}. An entry takes {', '.join(offered)}")
            values[name] = value_of(offered[name], value, where)
        try:
            records.append(option.kind(**{name: value for name, value in values.items() if value is not None}))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return tuple(records)


def value_of(option: Option, given: Any, where: str = "") -> Any:
    """The value of an option; None for its default.

    Args:
        given: a list of words, or what a YAML file holds.
        where: the file (or flag) it is from; empty for the command line.

    Raises:
        UserError: it does not fit.
    """
    if given is None:
        return None
    if isinstance(given, bool) and ("no", "yes")[given] in option.choices:
        given = ("no", "yes")[given]  # YAML reads a bare no as False, and --mixed_precision no is common
    if isinstance(given, dict) and option.several:
        given = [part for pair in given.items() for part in pair]
    try:
        return option.read([_word(part) for part in given] if isinstance(given, list) else [_word(given)])
    except ValueError as error:
        raise UserError(f"{where}: {option.name} {error}" if where else f"--{option.name} {error}") from None


def near_names(name: str, options: Mapping[str, Option], dashes: str) -> str:
    """The end of a message about a name that does not exist: those it may have meant."""
    close = functools.partial(difflib.get_close_matches, name, options)
    near = [option for option in options if option.startswith(name)]
    near = near[:3] or close(n=1, cutoff=0.85) or close(n=3, cutoff=0.6)
    if not near:
        return "."
    if len(near) > 1:
        return f". Did you mean one of {', '.join(dashes + option for option in near)}?"
    return f". Did you mean {dashes}{near[0]}? {filled(options[near[0]].help)}"


def _split(
    argv: Sequence[str], program: str, options: Mapping[str, Option], positional: str | None
) -> Iterator[tuple[str, list[str]]]:
    """``--a-b x y --c=z`` as ``("a_b", ["x", "y"]), ("c", ["z"])``.

    Words after a switch belong to the positional flag, unless that has its own already.
    """
    name, words = positional, list[str]()
    switches = {option for option in options if options[option].switch} if positional else set()
    for word in argv:
        flag = flag_in(word)
        if flag is None:
            if name is None:
                raise UserError(f"{word!r} belongs to no flag; see {program} --help")
            if name in switches and not words:
                yield name, words
                name = positional
            words.append(word)
            continue
        if name is not None and (words or name != positional):
            yield name, words
            switches = set() if name == positional else switches
        _, equals, value = word.partition("=")
        name, words = flag, [value] if equals else []
    if name is not None and (words or name != positional):
        yield name, words


def _switched_on(name: str, words: Sequence[str]) -> bool:
    if words:
        raise UserError(f"--{name} takes no value (got {shortened(' '.join(words))}): write --{name} or --no_{name}")
    return True


def _word(value: Any) -> str:
    """One value of a YAML file as it would stand on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):  # the betas of optimizer_args
        return ",".join(map(_word, value))
    if value is None or isinstance(value, dict):
        raise ValueError(
            f"takes no {'null' if value is None else 'mapping'} here (got {value!s:.160}); put text in quotes"
        )
    return str(value)


def _unneeded(name: str, options: Mapping[str, Option]) -> bool:
    """Whether a flag of diffusers can be passed over; says so."""
    if "dataset_name" not in options or name not in UNNEEDED:
        return False
    sys.stderr.write(f"note: --{name} is not needed: {UNNEEDED[name]}\n")
    return True


def _unknown(what: str, name: str, options: Mapping[str, Option], config_class: type) -> str:
    """The message for a flag or key that is no option."""
    of_others: Mapping[str, str] = getattr(config_class, "NOT_OFFERED", {})
    if name in of_others:
        return f"{what} is not offered: {of_others[name]}"
    if "dataset_name" in options and name in ELSEWHERE:
        return f"{what} is not offered: {filled(ELSEWHERE[name])}"
    return f"unknown {what}{near_names(name, options, '--')}"
