"""Prompts from text files and from the options."""

from __future__ import annotations

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


def sample_prompts(
    sample: Sample, instance_prompt: str | None = None, class_prompt: str | None = None
) -> tuple[str, ...]:
    """The prompts a run draws: of ``--sample_prompts``, else the training prompt and the class prompt; and
    ``--validation_prompt``. Each once.

    Raises:
        UserError: the file cannot be used, or there is no prompt at all.
    """
    if sample.sample_prompts:
        prompts = list(read_prompts(sample.sample_prompts, subject_of(instance_prompt)))
    else:
        prompts = [prompt for prompt in (instance_prompt, class_prompt) if prompt]
    if sample.validation_prompt:
        prompts.append(sample.validation_prompt)
    if not prompts:
        raise UserError("there is no prompt to draw: give --sample_prompts, or --sample_steps 0 for no samples")
    return tuple(dict.fromkeys(prompts))
