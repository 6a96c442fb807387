"""New tokens of the text encoders (pivotal tuning): the options, and what one of them says. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from dreamlora.config.ranges import above as _above
from dreamlora.config.ranges import at_least as _at_least
from dreamlora.config.ranges import short as _short
from dreamlora.config.ranges import steps_or_share as _steps_or_share
from dreamlora.errors import UserError

MOST_VECTORS = 64
"""Of one token: CLIP reads 75 in all."""
MOST_TOKENS = 100
_LONGEST = 50
_SPELLED = re.compile(r"(?P<token>[^=]*?)(?::(?P<vectors>\d{1,4}))?(?:=(?P<words>.*))?", re.DOTALL)
_NO_PART = re.compile(r"[\s,{}]")
"""Captions are cut at commas and blanks, and prompts have {} for the subject."""


@dataclass(frozen=True)
class NewToken:
    """What ``--new_tokens`` says of one token.

    Attributes:
        token: as it stands in captions and prompts.
        vectors: how many embeddings it has.
        words: that these start from, one after the other and then from the beginning; empty: a random start.
    """

    token: str
    vectors: int = 1
    words: tuple[str, ...] = ()

    @property
    def pieces(self) -> list[str]:
        """What a tokenizer calls its vectors, as diffusers' ``load_textual_inversion`` does."""
        return pieces_of(self.token, self.vectors)

    @classmethod
    def of(cls, text: str) -> NewToken:
        """Read ``TOKEN``, ``TOKEN=WORD``, ``TOKEN=WORD,WORD`` or ``TOKEN:VECTORS=WORD``.

        Raises:
            UserError: it is none of these; the message says what is wrong.
        """
        found = _SPELLED.fullmatch(text)
        assert found is not None  # everything fits: what is before "=" and what comes after it
        token, given = found["token"], found["words"]
        check_token(token, f"--new_tokens {text!r}")
        words = tuple(word for word in re.split(r"[,\s]+", given or "") if word)
        if given is not None and not words:
            raise UserError(
                f"--new_tokens {text!r}: there is no word behind =, whose embedding {token} could start from: give "
                f"one, such as {token}=dog, or {token} alone for a random start"
            )
        vectors = int(found["vectors"] or max(1, len(words)))
        if not 1 <= vectors <= MOST_VECTORS:
            raise UserError(f"--new_tokens {text!r}: a token has 1 to {MOST_VECTORS} vectors (got {vectors})")
        if len(words) > vectors:
            raise UserError(
                f"--new_tokens {text!r}: {len(words)} words for a token of {vectors} vector{'s'[: vectors > 1]}: every "
                f"vector starts from one word"
            )
        return cls(token, vectors, words)


def pieces_of(token: str, vectors: int) -> list[str]:
    """Names of a token's vectors: ``sks``, ``sks_1``, ``sks_2``, ..."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def check_token(token: str, where: str) -> None:
    """Nothing, if it can be a new token of CLIP's tokenizer.

    Raises:
        UserError: it cannot; the message begins with ``where``.
    """
    if not token:
        raise UserError(f"{where}: there is no token before =: give NAME=WORD, such as sks=dog")
    if len(token) > _LONGEST or _NO_PART.search(token) or not token.isprintable():
        raise UserError(
            f"{where}: {token[:_LONGEST]!r} cannot be a token: give one word of at most {_LONGEST} characters, without "
            "blanks, commas and braces"
        )
    if token != token.lower():
        raise UserError(f"{where}: CLIP reads lower case alone, and so would find {token} nowhere: {token.lower()}")
    if not file_stem(token):
        raise UserError(f"{where}: a token needs a letter or a digit, which its file is named after")


def file_stem(token: str) -> str:
    """What a token's file is called, which other programs know it by: without what no file name may have."""
    return re.sub(r"[^\w.-]", "", token).strip("._-")


def check_tokens(tokens: Sequence[str], where: str) -> None:
    """Nothing, if a tokenizer can tell these new tokens apart, and a folder their files.

    Raises:
        UserError: it cannot; the message begins with ``where``.
    """
    for one, other in combinations(tokens, 2):
        if one in other or other in one:
            raise UserError(
                f"{where}: {one} and {other} cannot be told apart, as one is a part of the other: give them other names"
            )
        if file_stem(one) == file_stem(other):
            raise UserError(f"{where}: {one} and {other} would both be saved as {file_stem(one)}: rename one")


@dataclass(frozen=True)
class NewTokens:
    """New tokens, whose embeddings are learned beside the LoRA (pivotal tuning)."""

    new_tokens: tuple[str, ...] = ()
    """New tokens of the CLIP text encoders, each with the word that its embedding starts from, such as sks=dog; also
    sks=dog,fluffy for a vector from each word, sks:4=dog for 4 vectors, sks alone for a random start."""
    new_tokens_lr: float | None = None
    """Learning rate of their embeddings. Default: --learning_rate, or the optimizer's own for what is no LoRA."""
    new_tokens_end: float | None = None
    """Steps after which the embeddings stay as they are; below 1 a share of the run. Default: they train to the end."""
    new_tokens_weight_decay: float = 0.0
    """Weight decay of the embeddings."""

    def __post_init__(self) -> None:
        _short(self, "new_tokens")
        _at_least(self, 0, "new_tokens_lr", "new_tokens_weight_decay")
        _above(self, 0, "new_tokens_end")
        if self.new_tokens_end is not None:
            _steps_or_share(self, "new_tokens_end")
        if len(self.new_tokens) > MOST_TOKENS:
            raise UserError(f"--new_tokens: {MOST_TOKENS} are the most (got {len(self.new_tokens)})")
        check_tokens([new.token for new in self.tokens], "--new_tokens")
        for name in ("new_tokens_lr", "new_tokens_end", "new_tokens_weight_decay"):
            if not self.new_tokens and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name} is only used together with --new_tokens")

    @property
    def tokens(self) -> list[NewToken]:
        """What is asked for."""
        return [NewToken.of(text) for text in self.new_tokens]
