"""Embeddings of images, kept on disk: an image is encoded once per encoder, whichever run shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dreamlora.data.cache import TensorCache, content_key
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.interfaces import Encoder

logger = logging.getLogger(__name__)

BATCH = 64
Failure = UserError | ValueError


def _alone(part: list[Any]) -> list[Any]:
    return part


@dataclass(frozen=True)
class Processes:
    """The processes that share the work.

    Attributes:
        rank: of this one.
        world: how many there are.
        gather: the lists of all processes as one list, on every process: ``processes.gather_lists``.
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = _alone


ALONE = Processes()


class Embedder:
    """An encoder with a cache, whose work all processes share.

    Args:
        encoder: what encodes.
        cache: where vectors are kept, by the encoder's id and the image's content.
        processes: every process calls with the same arguments and gets all vectors.
        progress: show a bar in the process of rank 0.
    """

    def __init__(
        self, encoder: Encoder, cache: TensorCache, processes: Processes = ALONE, progress: bool = False
    ) -> None:
        self.encoder = encoder
        self._cache = cache
        self._processes = processes
        self._silent = not progress or processes.rank != 0

    def images(self, records: Sequence[ImageRecord]) -> Tensor:
        """Vectors ``[n, dim]`` float32 of all records.

        Process ``rank`` reads ``records[rank::world]`` and no others: those may lie on another machine's disk.

        Raises:
            UserError: an image cannot be read.
            ValueError: a vector is zero or not finite; the message names the file.
        """
        share = range(self._processes.rank, len(records), self._processes.world)
        outcome: tuple[list[int], Tensor] | Failure
        try:
            outcome = list(share), self._own([records[index] for index in share])
        except (UserError, ValueError) as error:
            outcome = error  # raised after the others have been told: they would wait for ever
        vectors = torch.zeros(len(records), self.encoder.dim)
        for part in self._processes.gather([outcome]):
            if isinstance(part, Exception):
                raise part
            vectors[part[0]] = part[1]
        return vectors

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Vectors ``[n, dim]`` float32 of the prompts; they are cheap and not cached.

        Raises:
            UserError: the encoder knows no texts.
        """
        row = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        vectors = self.encoder.texts(list(row))
        return vectors[[row[prompt] for prompt in prompts]]

    def _own(self, records: Sequence[ImageRecord]) -> Tensor:
        keys = [content_key("embedding", self.encoder.id, record.content_hash()) for record in records]
        by_key = dict(zip(keys, records, strict=True))
        missing = self._cache.missing(by_key)
        bar = tqdm(total=len(missing), desc="embedding", unit="image", disable=self._silent or not missing, leave=False)
        with bar:
            for batch in _batches(missing):
                vectors = self.encoder.images([by_key[key].open() for key in batch])
                for key, vector in zip(batch, vectors, strict=True):
                    _refuse_pointless(vector, by_key[key].where)
                    self._cache.put(key, {"vector": vector})
                bar.update(len(batch))
        rows = [self._cache.load(key)["vector"] for key in keys]
        return torch.stack(rows) if rows else torch.zeros(0, self.encoder.dim)


def _batches(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), BATCH):
        yield keys[start : start + BATCH]


def _refuse_pointless(vector: Tensor, where: str) -> None:
    if not vector.isfinite().all() or not vector.any():
        raise ValueError(f"the embedding of {where} is zero or not finite: look at the image, or use another encoder")
