"""Tokens and passwords stay out of all that is written or said: command lines, options, messages.

They are found by the name of their flag or variable, by the form that a service's tokens have, and by their place in an
address. Words of a command line are masked before they are quoted: of a token in two words both are.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "***"
"""Stands in the place of a secret."""

_LONGEST = 2**16
"""Characters of a command that is taken apart, which takes the longer for each the more there are."""

_NAME = re.compile(r"(?:^|_)(?:hub_t\w*|token|\w*(?:secret|passw(?:or)?d|api_?key)\w*)$", re.IGNORECASE)
"""Of flags, options and variables; also flags that were cut short, or are of other programs."""
_FLAG = re.compile(r"-{1,2}[A-Za-z]")
_CUT = re.compile(r"(--?hub[_-]t[\w-]*[=\s]).*", re.IGNORECASE | re.DOTALL)
_ASSIGNED = re.compile(r"\b([A-Za-z]\w*)=(\"[^\"]*\"|'[^']*'|\S+)")
_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@]+@", re.IGNORECASE)
_FORMS = re.compile(
    r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{16,}|wandb_v\d_\w{16,}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[\w-]{16,})"
)


def is_secret(name: str) -> bool:
    """Whether an option of this name holds a secret."""
    return _NAME.search(name.lstrip("-").replace("-", "_")) is not None


def masked(text: str) -> str:
    """A text without what can be known as a secret in it."""
    text = _ADDRESS.sub(rf"\1{HIDDEN}@", _FORMS.sub(HIDDEN, text))
    return _ASSIGNED.sub(lambda found: f"{found[1]}={HIDDEN}" if is_secret(found[1]) else found[0], text)


def masked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, with the secrets masked."""
    return {name: HIDDEN if is_secret(name) and value else _masked_value(value) for name, value in options.items()}


def _masked_value(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_masked_value, value))
    return masked_options(value) if isinstance(value, dict) else value


def command_line(words: Sequence[str]) -> str:
    """Words as a shell takes them, without secrets."""
    return " ".join(map(quoted, _masked_words(words)))


def quoted(word: str) -> str:
    """A word as a shell takes it; what stands for a secret alone needs no quotes, for it has to be replaced anyway."""
    rest = word.replace(HIDDEN, "x")
    return word if shlex.quote(rest) == rest else shlex.quote(word)


def masked_command(command: str) -> str:
    """A command line that was written down, without secrets: it may be an older version's, or somebody else's."""
    if len(command) > _LONGEST:
        return f"(a command line of {len(command):,} characters)"
    try:
        return command_line(shlex.split(command))
    except ValueError:  # its quotes are not in order
        return _cut(command)


def _masked_words(words: Sequence[str]) -> Iterator[str]:
    """Whatever follows a flag is its value, until the next one; a token may begin with a dash."""
    secret, first = False, False
    for word in words:
        name, equals, _ = word.partition("=")
        if first and not word.startswith("--"):
            yield HIDDEN
            first = False
        elif _FLAG.match(word):
            secret = is_secret(name)
            first = secret and not equals
            yield f"{name}={HIDDEN}" if secret and equals else masked(word)
        else:
            yield HIDDEN if secret else f"{name}={HIDDEN}" if equals and is_secret(name) else _cut(word)


def _cut(text: str) -> str:
    """A text in which a command may stand: all that follows a secret's flag may belong to the secret."""
    return _CUT.sub(rf"\1{HIDDEN}", masked(text))
