"""Prompts from text files and from the options."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dreamlora.config import Sample
from dreamlora.errors import UserError

PLACEHOLDER = "{}"


def read_prompts(file: Path, subject: str | None = None) -> tuple[str, ...]:
    """The prompts of a text file: one per line; blank lines and lines that begin with ``#`` are left out.

    Args:
        file: UTF-8 text.
        subject: takes the place of ``{}``, such as "sks dog".

    Raises:
        UserError: the file is missing, no text, or without prompts; or a line has ``{}`` and there is no subject.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {file}: {error}") from None
    prompts = [
        fill_subject(line.strip(), subject, f"{file}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.strip().startswith("#")
    ]
    if not prompts:
        raise UserError(f"{file} holds no prompts: write one per line")
    return tuple(prompts)


def fill_subject(prompt: str, subject: str | None, where: str) -> str:
    """``prompt`` with ``subject`` in place of ``{}``; ``where`` it stands is for the error message.

    Raises:
        UserError: there is a ``{}`` and no subject.
    """
    if PLACEHOLDER not in prompt:
        return prompt
    if not subject:
        raise UserError(
            f'{where}: nothing to put in place of {PLACEHOLDER} in "{prompt}": give the subject, such as "sks dog" '
            f"(training reads it from --instance_prompt, `dreamlora sample` from --subject), or write it into the line"
        )
    return prompt.replace(PLACEHOLDER, subject)


def subject_of(instance_prompt: str | None) -> str | None:
    """What an instance prompt is about: "sks dog" of "a photo of sks dog"; None if it does not tell."""
    if not instance_prompt:
        return None
    words = instance_prompt.rstrip(" .").rpartition(" of ")[2].split()
    if words and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words) or None


def names_subject(prompt: str, subject: str | None) -> bool:
    """Whether a prompt is about the subject: all its words are there, as in "a red sks dog"; True if none is known."""
    return not subject or set(_words(subject)) <= set(_words(prompt))


def scored_text(prompt: str, subject: str | None, class_prompt: str | None = None) -> str:
    """The prompt as a CLIP score takes it: with the class in place of the subject, "a dog in the snow".

    The rare token means nothing to CLIP. The class is what ``class_prompt`` is about, or the subject without its first
    word; without a class prompt, a subject of one word stays.
    """
    if not subject or not names_subject(prompt, subject):
        return prompt
    words = _words(subject)
    kind = subject_of(class_prompt) or " ".join(words[1:])
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


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def sample_prompts(
    sample: Sample,
    instance_prompt: str | None = None,
    class_prompt: str | None = None,
    captions: Iterable[str] = (),
) -> tuple[str, ...]:
    """The prompts a run draws: of ``--sample_prompts``, else the training prompt and the class prompt; and
    ``--validation_prompt``. Each once. Where all of these are missing, ``captions``.

    Raises:
        UserError: the file cannot be used, or there is no prompt at all.
    """
    if sample.sample_prompts:
        prompts = list(read_prompts(sample.sample_prompts, subject_of(instance_prompt)))
    else:
        prompts = [prompt for prompt in (instance_prompt, class_prompt) if prompt]
    if sample.validation_prompt:
        prompts.append(sample.validation_prompt)
    prompts = prompts or list(captions)
    if not prompts:
        raise UserError("there is no prompt to draw: give --sample_prompts, or --sample_steps 0 for no samples")
    return tuple(dict.fromkeys(prompts))
