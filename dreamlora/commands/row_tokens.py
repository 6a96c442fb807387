"""New tokens in ``sample`` and ``evaluate``: those that lie beside a LoRA, those given by hand, and their start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlora.commands.rows import Row
from dreamlora.config.new_tokens import NewToken, check_tokens
from dreamlora.interfaces import Components, Family
from dreamlora.lora.embeddings import TokenFile, digest_of, read_all
from dreamlora.models.new_tokens import Vectors, starts


@dataclass(frozen=True)
class RowTokens:
    """The new tokens of one row.

    Attributes:
        files: with their embeddings.
        untrained: tokens of the run that the base model is shown with, at what they started from.
        seed: of that run.
    """

    files: Sequence[TokenFile] = ()
    untrained: Sequence[NewToken] = ()
    seed: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many vectors each token has."""
        trained = {file.token: len(next(iter(file.vectors.values()))) for file in self.files}
        return {new.token: new.vectors for new in self.untrained} | trained

    @property
    def made_of(self) -> dict[str, Any]:
        """What decides an image by them, as JSON can say it; nothing without new tokens."""
        found = {"embeddings": digest_of([file.path for file in self.files])} if self.files else {}
        start = [[new.token, new.vectors, *new.words] for new in self.untrained]
        return {**found, **({"new_tokens": start, "seed": self.seed} if start else {})}

    def vectors(self, text: Components, family: Family) -> Vectors:
        """The embeddings, for ``put_for_a_while``.

        Raises:
            UserError: a start's word is several tokens.
        """
        untrained = starts(text, list(family.EMBEDDING_KEYS), self.untrained, self.seed)
        return untrained | {file.token: file.vectors for file in self.files}


def tokens_of(row: Row, given: Sequence[Path], settings: Mapping[str, Any], family: Family) -> RowTokens:
    """The new tokens of a row. Those given by hand take the place of the LoRA's own.

    The base model has the tokens of the first run at their start, as that run drew and measured it at step 0.

    Args:
        given: files of ``--embeddings``.
        settings: options of the first run, by flag.

    Raises:
        UserError: a file cannot be read, or is for another kind of model; or tokens cannot be told apart.
    """
    by_hand = read_all(given, family.EMBEDDING_KEYS)
    names = {file.token for file in by_hand}
    own = [file for file in read_all(row.embeddings, family.EMBEDDING_KEYS) if file.token not in names]
    untrained = [NewToken.of(text) for text in settings.get("new_tokens") or ()] if row.lora is None else []
    untrained = [new for new in untrained if new.token not in names] if family.EMBEDDING_KEYS else []
    check_tokens([*names, *(file.token for file in own), *(new.token for new in untrained)], "--embeddings")
    return RowTokens([*by_hand, *own], untrained, settings.get("seed") or 0)
