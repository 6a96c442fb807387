"""Prompts from text files and from the options; and what is learned, as prompts speak of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreamlora.config import Sample
from dreamlora.config.ranges import check_length
from dreamlora.errors import UserError
from dreamlora.reading import UnreadableError, utf8_text

PLACEHOLDER = "{}"
PROMPTS_BYTES = 2**24
"""Of a file of prompts."""
MOST_PROMPTS = 100_000
"""Of a file: lists for metrics have some ten thousand."""


@dataclass(frozen=True)
class Subject:
    """What is learned, and what it is one of.

    Attributes:
        name: in prompts, such as "sks dog"; None: not known.
        instance_prompt: of its images, such as "a photo of sks dog".
        class_prompt: of other images of the class, such as "a photo of a dog".
    """

    name: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None

    @classmethod
    def of(cls, instance_prompt: str | None, class_prompt: str | None = None, name: str | None = None) -> Subject:
        """The subject that an instance prompt is about, unless it is named.

        Raises:
            UserError: a prompt has a ``{}``: what takes its place is read from these prompts.
        """
        for flag, prompt in (("instance_prompt", instance_prompt), ("class_prompt", class_prompt)):
            check_length(prompt or "", f"--{flag}")
            if PLACEHOLDER in (prompt or ""):
                raise UserError(
                    f'--{flag} "{prompt}": {PLACEHOLDER} has no meaning here: what takes its place in other '
                    "prompts is read from this flag and its like; write it out"
                )
        return cls(name or _object_of(instance_prompt), instance_prompt, class_prompt)

    def put_into(self, prompt: str, where: str) -> str:
        """``prompt`` with the name in place of ``{}``; ``where`` it stands is for the error message.

        Raises:
            UserError: there is a ``{}`` and no name, or the text gets too long.
        """
        if PLACEHOLDER not in prompt:
            return prompt
        if not self.name:
            raise UserError(
                f'{where}: nothing to put in place of {PLACEHOLDER} in "{prompt}": give the subject, such as "sks dog" '
                "(training reads it from --instance_prompt, `dreamlora sample` from --subject), or write it out"
            )
        filled = prompt.replace(PLACEHOLDER, self.name)
        check_length(filled, where)
        return filled

    def is_in(self, prompt: str) -> bool:
        """Whether a prompt has all words of the name, as "a red sks dog" has; True if no name is known."""
        return not self.name or set(_words(self.name)) <= set(_words(prompt))

    def scored_text(self, prompt: str) -> str:
        """The prompt as a CLIP score takes it: with the class in place of the subject, "a dog in the snow".

        The rare token means nothing to CLIP. The class is what ``class_prompt`` is about, or the name without its first
        word; without a class prompt, a name of one word stays.
        """
        if not self.name or not self.is_in(prompt):
            return prompt
        words = _words(self.name)
        kind = _object_of(self.class_prompt) or " ".join(words[1:])
        rare = set(words) - set(_words(kind))
        if not kind or not rare:
            return prompt
        stands_in = [kind] if rare == set(words) else []
        text: list[str] = []
        for word in prompt.split():
            if rare.isdisjoint(_words(word)):
                text.append(word)
            else:
                text += stands_in
                stands_in = []
        return " ".join(text)


UNKNOWN = Subject()
"""Nothing is known of what is learned, or it is a style."""


def _object_of(prompt: str | None) -> str | None:
    """What a prompt is about: "sks dog" of "a photo of sks dog"; None if it does not tell."""
    if not prompt:
        return None
    words = prompt.rstrip(" .").rpartition(" of ")[2].split()
    if words and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words) or None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def read_prompts(file: Path, subject: Subject = UNKNOWN) -> tuple[str, ...]:
    """The prompts of a text file: one per line; blank lines and lines that begin with ``#`` are left out.

    Args:
        file: UTF-8 text.
        subject: takes the place of ``{}``.

    Raises:
        UserError: the file is missing, no text, too large, or without prompts; a line is too long, or has ``{}`` and
            there is no subject.
    """
    try:
        lines = utf8_text(file, PROMPTS_BYTES).splitlines()
    except FileNotFoundError:
        raise UserError(f"cannot read the prompts in {file}: there is no such file") from None
    except UnreadableError as error:
        raise UserError(f"cannot read the prompts in {file}: {error.reason}") from None
    prompts = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            check_length(line, f"{file}, line {number}")
            prompts.append(subject.put_into(line, f"{file}, line {number}"))
    if not prompts:
        raise UserError(f"{file} holds no prompts: write one per line")
    if len(prompts) > MOST_PROMPTS:
        raise UserError(f"{file} holds {len(prompts):,} prompts: {MOST_PROMPTS:,} are the most")
    return tuple(prompts)


def with_subject(sample: Sample, subject: Subject) -> Sample:
    """The options with the subject in the prompts that they hold.

    Raises:
        UserError: there is a ``{}`` and no subject.
    """
    filled: dict[str, Any] = {
        name: subject.put_into(prompt, f"--{name}")
        for name in ("validation_prompt", "negative_prompt")
        if (prompt := getattr(sample, name))
    }
    return replace(sample, **filled)


def sample_prompts(sample: Sample, subject: Subject = UNKNOWN, captions: Iterable[str] = ()) -> tuple[str, ...]:
    """The prompts a run draws: of ``--sample_prompts``, else the training prompt and the class prompt; and
    ``--validation_prompt``. Each once. Where all of these are missing, ``captions``.

    Raises:
        UserError: the file cannot be used, there is no prompt at all, or nothing for a ``{}``.
    """
    sample = with_subject(sample, subject)
    if sample.sample_prompts:
        prompts = list(read_prompts(sample.sample_prompts, subject))
    else:
        prompts = [prompt for prompt in (subject.instance_prompt, subject.class_prompt) if prompt]
    if sample.validation_prompt:
        prompts.append(sample.validation_prompt)
    prompts = prompts or list(captions)
    if not prompts:
        raise UserError("there is no prompt to draw: give --sample_prompts, or --sample_steps 0 for no samples")
    return tuple(dict.fromkeys(prompts))
